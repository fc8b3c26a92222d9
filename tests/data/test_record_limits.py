"""A record whose rendering loops or fills memory is dropped with file:line, in workers too, and no other record is."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from support.tokenizers import make_tokenizer

from qlora.data import Data
from qlora.data.conversations import encode_records, record_limits, worker_pool
from qlora.data.conversations.encoder import Encoder
from qlora.data.prepare import prepare
from qlora.data.types import BadRecord, Example, Message, Record, RecordError

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no such limits")
TEMPLATE = (  # ChatML, except for records with LOOP or BLOW
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% if 'LOOP' in m.content %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    "{% endif %}"
    "{% if 'BLOW' in m.content %}{{ m.content * 900000000 }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.sample(of=4)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_record_that_makes_the_template_loop_or_fill_memory_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(worker_pool, "available_workers", lambda: workers)
    monkeypatch.setattr(encode_records, "CHUNK_RECORDS", 32)
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    path = tmp_path / "records.jsonl"
    records = [{"prompt": {90: "LOOP", 95: "BLOW"}.get(i, f"q {i}"), "completion": "yes"} for i in range(1, 121)]
    path.write_text("\n".join(map(json.dumps, records)))
    encoder = Encoder(make_tokenizer("bytes", "chatml"), "assistant", str(tmp_path / "template.jinja"))
    started = time.monotonic()
    report = prepare(Data.model_validate({"train": str(path), "max_length": 99}), encoder, 0).report
    assert time.monotonic() - started < 60
    dropped = {f.where: f.message for f in report.warnings if f.message.startswith("dropped")}
    assert list(dropped) == [f"{path}:90", f"{path}:95"] and report.kept == 118
    assert "takes too long to render: more than 1 s" in dropped[f"{path}:90"]
    assert "MemoryError" in dropped[f"{path}:95"] or "characters out of" in dropped[f"{path}:95"]


def test_time_within_the_limit_is_allowed_and_no_signal_comes_later() -> None:
    before = signal.getsignal(signal.SIGVTALRM)
    with record_limits.time_limit(0.2):
        pass
    spin(0.4)
    with pytest.raises(RecordError, match=r"more than 0\.05 s"), record_limits.time_limit(0.05):
        while True:
            pass
    assert signal.getsignal(signal.SIGVTALRM) == before
    with record_limits.time_limit(0.05):
        time.sleep(0.2)  # waiting takes no processor time: a busy machine drops no records


def spin(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_a_record_above_the_limit_runs_alone_once_only() -> None:
    calls = list[str]()

    def render(record: list[str]) -> str:
        calls.append(record[0])
        if record[0] == "loop":
            spin(9)
        return record[0]

    group = record_limits.within_time([["a"], ["loop"], ["b"]], render, 0.1)
    assert [group[0], group[2]] == ["a", "b"] and isinstance(group[1], RecordError)
    assert calls == ["a", "loop", "a", "loop", "b"]  # first together under one limit
    calls.clear()
    (alone,) = record_limits.within_time([["loop"]], render, 0.1)
    assert isinstance(alone, RecordError) and calls == ["loop"]


def test_an_exception_handler_can_not_catch_the_time_limit() -> None:
    with pytest.raises(RecordError), record_limits.time_limit(0.05):
        while True:
            try:
                spin(1)
            except Exception:
                continue


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="the size of a process is not known here")
def test_memory_above_the_limit_is_refused_and_the_limit_is_removed() -> None:
    with record_limits.memory(2**28), pytest.raises(MemoryError):
        bytearray(2**30)
    assert len(bytearray(2**29)) == 2**29


def test_outside_the_main_thread_records_are_encoded() -> None:
    examples = list[Example]()
    encoder = Encoder(make_tokenizer("bytes", "chatml"))
    turns = [Message("user", "Hi"), Message("assistant", "Ho")]
    thread = threading.Thread(target=lambda: examples.append(encoder.encode("x:1", turns)))
    thread.start()
    thread.join()
    assert examples[0].trained_tokens()


def test_a_template_with_a_huge_constant_is_refused(tmp_path: Path) -> None:
    """jinja2 computes constants when it compiles a template: without a memory limit they fill memory."""
    path = tmp_path / "template.jinja"
    path.write_text(TEMPLATE.replace("m.content * 900000000", "'a' * 6000000000"))
    started = time.monotonic()
    try:
        Encoder(make_tokenizer("bytes", "chatml"), "assistant", str(path))
    except Exception as error:
        assert "template" in str(error)
    assert time.monotonic() - started < 60


def test_few_long_records_are_in_memory_together() -> None:
    records = [Record(f"x:{i}", {"messages": [{"content": "a" * 300_000}]}) for i in range(9)]
    chunks = list(encode_records._chunks(iter([*records, BadRecord("x:10", "bad")]), 512))
    assert [len(chunk) for chunk in chunks] == [4, 4, 2]
    short = [Record(f"x:{i}", {"input_ids": [1, 2]}) for i in range(1200)]
    assert [len(chunk) for chunk in encode_records._chunks(iter(short), 512)] == [512, 512, 176]
