"""Worker processes change how long it takes and nothing else: results bit for bit, dead workers made good, no hang."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from support.paths import ROOT, TESTS
from support.tokenizers import tokenizer_of

from qlora.data import Data
from qlora.data.conversations import encode_records, worker_pool
from qlora.data.conversations.encoder import Encoder
from qlora.data.prepare import prepare
from qlora.errors import DataError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system can't fork")
ALIVE_SECONDS = 10.0  # of silence that would be a hang


@dataclass
class Item:
    where: str
    value: int


def chunks_of(count: int, size: int = 4):
    items = [Item(f"rows.jsonl:{i}", i) for i in range(1, count + 1)]
    return iter([items[at : at + size] for at in range(0, count, size)])


def squares(chunk):
    return [item.value**2 for item in chunk]


def results(work, count: int, crew: int) -> list[int]:
    return [one for _, made in worker_pool.in_order(work, chunks_of(count), crew) for one in made]


@pytest.mark.parametrize("crew", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 4, 5, 103])
def test_results_come_in_the_order_of_the_chunks(count, crew):
    def slow_at_first(chunk):
        time.sleep(0.02 if chunk[0].value == 1 else 0)
        return squares(chunk)

    assert results(slow_at_first, count, crew) == [i**2 for i in range(1, count + 1)]


def test_a_worker_killed_at_random_fifty_times_changes_nothing(tmp_path):
    draw, parent = random.Random(0), os.getpid()
    for trial in range(50):
        victim, marker = draw.randrange(1, 61), tmp_path / str(trial)
        number = draw.choice([signal.SIGKILL, signal.SIGTERM])

        def work(chunk, victim=victim, marker=marker, number=number):
            if any(item.value == victim for item in chunk) and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), number)
            return squares(chunk)

        started = time.monotonic()
        assert results(work, 60, 2) == [i**2 for i in range(1, 61)]
        assert time.monotonic() - started < ALIVE_SECONDS
        assert marker.exists()
    assert os.getpid() == parent


def test_a_row_that_kills_its_worker_again_and_again_is_named():
    def work(chunk):
        if any(item.value == 30 for item in chunk):
            os.kill(os.getpid(), signal.SIGKILL)
        return squares(chunk)

    with pytest.raises(DataError, match=r"^rows\.jsonl:30: encoding this row ends its worker process"):
        results(work, 60, 3)


def test_a_row_that_takes_for_ever_is_named(monkeypatch):
    monkeypatch.setattr(worker_pool, "_CHUNK_SECONDS", 0.5)
    monkeypatch.setattr(worker_pool, "_ROW_SECONDS", 0.5)

    def work(chunk):
        if any(item.value == 7 for item in chunk):
            time.sleep(600)
        return squares(chunk)

    started = time.monotonic()
    with pytest.raises(DataError, match=r"rows\.jsonl:7: encoding this row"):
        results(work, 20, 2)
    assert time.monotonic() - started < ALIVE_SECONDS


def test_an_error_of_the_work_is_raised_here_as_it_is():
    def work(chunk):
        raise DataError(f"{chunk[0].where}: no")

    with pytest.raises(DataError, match=r"rows\.jsonl:\d+: no"):
        results(work, 60, 2)


def test_no_worker_outlives_the_walk_whoever_ends_it():
    crew = worker_pool.WorkerPool(squares, 3)
    pids = [worker.process.pid for worker in crew._workers]
    found = crew.run(chunks_of(400))
    next(found)
    found.close()
    crew.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


ORPHANS = """
import os, signal, sys
from dataclasses import dataclass
from qlora.data.conversations import worker_pool
@dataclass
class Item:
    where: str
crew = worker_pool.Crew(lambda chunk: [1] * len(chunk), 3)
print(*[worker.process.pid for worker in crew._workers], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_when_their_parent_is_killed():
    root = str(ROOT)
    made = subprocess.run([sys.executable, "-c", ORPHANS], capture_output=True, text=True, cwd=root, timeout=60)
    deadline = time.monotonic() + ALIVE_SECONDS
    for pid in map(int, made.stdout.split()):
        while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1][:3]:
            assert time.monotonic() < deadline, "a worker outlived its parent"
            time.sleep(0.05)


def written(folder: Path, count: int) -> Path:
    draw = random.Random(0)
    lines = []
    for i in range(count):
        words = " ".join(draw.choices(["one", "zwei", "trois", "é😀", "<|im_end|>"], k=draw.randrange(1, 30)))
        row = {"prompt": f"{i} {words}", "completion": words if i % 17 else ""}
        lines.append(json.dumps(row) if i % 23 else '{"broken')
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("parallel", ["true", "false"])
def test_rows_prepared_by_workers_are_those_of_one_process(tmp_path, monkeypatch, parallel):
    """With the tokenizer's own threads used before the fork, which would leave a worker waiting for them for ever."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", parallel)
    monkeypatch.setenv("QLORA_CACHE", "")
    monkeypatch.setattr(encode_records, "CHUNK_ROWS", 32)
    data = Data.model_validate({"train": str(written(tmp_path, 400)), "max_length": 300, "overlong": "truncate"})
    made, told = [], []
    for count in (1, 3):
        monkeypatch.setattr(worker_pool, "available", lambda count=count: count)
        made.append(prepare(data, Encoder(tokenizer_of("bytes", "chatml")), 0, progress=told.append))
    one, three = made
    assert one.report == three.report and one.report.dropped["not JSON"] == 18 and one.report.control_rows > 100
    for rows, others in ((one.train, three.train), (one.eval, three.eval)):
        for a, b in zip(rows, others, strict=True):
            assert a.where == b.where and a.parts == b.parts and a.boundaries == b.boundaries
            assert np.array_equal(a.input_ids, b.input_ids) and np.array_equal(a.labels, b.labels)
    assert told == [256, 256]


def test_a_small_set_starts_no_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(worker_pool, "available", lambda: 4)
    monkeypatch.setattr(worker_pool, "WorkerPool", None)
    data = Data.model_validate({"train": str(written(tmp_path, 100)), "max_length": 300})
    assert prepare(data, Encoder(tokenizer_of("bytes", "chatml")), 0).report.rows == 100


MEMORY = """
import json, sys
sys.path.insert(0, {paths!r})
from support.tokenizers import tokenizer_of
from qlora.data import Data
from qlora.data.prepare import prepare
from qlora.data.conversations.encoder import Encoder
def peak_bytes():
    lines = open("/proc/self/status").read().splitlines()  # ru_maxrss would be the parent's, where that is larger
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
data = Data.model_validate({{"train": {path!r}, "max_length": 512, "eval_fraction": 0.01}})
made = prepare(data, Encoder(tokenizer_of("bytes", "chatml")), 0)
print(json.dumps([peak_bytes(), made.report.kept, made.report.tokens]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_peak_memory_does_not_grow_with_the_rows(tmp_path):
    """30,000 rows more may cost 200 bytes each (keys, lengths, order: 110 measured), not the 2,600 of objects."""
    line = json.dumps({"text": "word " * 20 + "{}"})
    peaks = []
    for count in (5_000, 35_000):
        path = tmp_path / f"{count}.jsonl"
        path.write_text("\n".join(line.replace("{}", str(i)) for i in range(count)))
        code = MEMORY.format(paths=str(TESTS), path=str(path))
        root = str(ROOT)
        made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=300)
        assert made.returncode == 0, made.stderr
        peak, kept, tokens = json.loads(made.stdout)
        assert kept == count and tokens > 100 * count
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 200 * 30_000 + 8 * 2**20  # and what allocators differ by from run to run
