"""A row whose rendering loops or blows up is dropped with file:line, here as in workers, and no other row is."""

import json
import os
import signal
import threading
import time

import pytest
from support.tokenizers import tokenizer_of

from qlora.data import Data
from qlora.data.conversations import encode_records, record_limits
from qlora.data.conversations.encoder import Encoder
from qlora.data.prepare import prepare
from qlora.data.types import RecordError

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no such limits")
TEMPLATE = (  # an honest ChatML, until a row says so
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% if 'LOOP' in m.content %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    "{% endif %}"
    "{% if 'BLOW' in m.content %}{{ m.content * 900000000 }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("crew", [1, 2])
def test_a_row_that_makes_the_template_loop_or_blow_up_is_dropped_and_named(tmp_path, monkeypatch, crew):
    monkeypatch.setattr(record_limits.time_limit.__wrapped__, "__defaults__", (0.3,))
    monkeypatch.setattr("qlora.data.conversations.worker_pool.available", lambda: crew)
    monkeypatch.setattr(encode_records.encoded_rows, "__defaults__", (1, 32))
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": {90: "LOOP", 95: "BLOW"}.get(i, f"q {i}"), "completion": "yes"} for i in range(1, 121)]
    path.write_text("\n".join(map(json.dumps, rows)))
    encoder = Encoder(tokenizer_of("bytes", "chatml"), "assistant", str(tmp_path / "template.jinja"))
    started = time.monotonic()
    report = prepare(Data.model_validate({"train": str(path), "max_length": 99}), encoder, 0).report
    assert time.monotonic() - started < 60
    dropped = {f.where: f.message for f in report.warnings if f.message.startswith("dropped")}
    assert list(dropped) == [f"{path}:90", f"{path}:95"] and report.kept == 118
    assert "takes too long to render: more than 0.3 s" in dropped[f"{path}:90"]
    assert "MemoryError" in dropped[f"{path}:95"] or "characters out of" in dropped[f"{path}:95"]


def test_what_takes_its_time_within_the_ceiling_is_left_alone_and_nothing_rings_later():
    before = signal.getsignal(signal.SIGVTALRM)
    with record_limits.time_limit(0.2):
        pass
    spin(0.4)
    with pytest.raises(RecordError, match=r"more than 0\.05 s"), record_limits.time_limit(0.05):
        while True:
            pass
    assert signal.getsignal(signal.SIGVTALRM) == before
    with record_limits.time_limit(0.05):
        time.sleep(0.2)  # waiting is not computing: a busy machine drops no rows


def spin(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_no_exception_handler_between_can_keep_the_bell_to_itself():
    with pytest.raises(RecordError), record_limits.time_limit(0.05):
        while True:
            try:
                spin(1)
            except Exception:
                continue


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="the size of a process is not known here")
def test_memory_beyond_the_ceiling_is_not_given_and_the_ceiling_goes_away():
    with record_limits.memory(2**28), pytest.raises(MemoryError):
        bytearray(2**30)
    assert len(bytearray(2**29)) == 2**29


def test_outside_the_main_thread_rows_are_still_encoded():
    made = []
    encoder = Encoder(tokenizer_of("bytes", "chatml"))
    from qlora.data.types import Message

    turns = [Message("user", "Hi"), Message("assistant", "Ho")]
    thread = threading.Thread(target=lambda: made.append(encoder.encode("x:1", turns)))
    thread.start()
    thread.join()
    assert made[0].trained_tokens()


def test_a_text_that_the_compiler_would_fold_into_the_code_is_refused(tmp_path):
    """jinja2 computes constants when it compiles: with a ceiling it gives up, without one it would take the memory."""
    path = tmp_path / "template.jinja"
    path.write_text(TEMPLATE.replace("m.content * 900000000", "'a' * 6000000000"))
    started = time.monotonic()
    try:
        Encoder(tokenizer_of("bytes", "chatml"), "assistant", str(path))
    except Exception as error:
        assert "template" in str(error)
    assert time.monotonic() - started < 60


def test_long_rows_are_held_few_at_a_time(monkeypatch):
    from qlora.data.types import BadRecord, Record

    rows = [Record(f"x:{i}", {"messages": [{"content": "a" * 300_000}]}) for i in range(9)]
    chunks = list(encode_records._chunks(iter([*rows, BadRecord("x:10", "bad")]), 512))
    assert [len(chunk) for chunk in chunks] == [4, 4, 2]
    short = [Record(f"x:{i}", {"input_ids": [1, 2]}) for i in range(1200)]
    assert [len(chunk) for chunk in encode_records._chunks(iter(short), 512)] == [512, 512, 176]
