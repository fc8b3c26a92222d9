"""Worker processes change the duration and nothing else: equal results, lost chunks encoded again, no hang."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from support.paths import ROOT, TESTS
from support.tokenizers import make_tokenizer

from qlora.data import Data
from qlora.data.conversations import encode_records, worker_pool
from qlora.data.conversations.encoder import Encoder
from qlora.data.prepare import prepare
from qlora.errors import DataError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system can't fork")
HANG_SECONDS = 10.0  # a test that takes longer hangs


@dataclass
class Item:
    where: str
    value: int


def make_chunks(count: int, size: int = 4) -> Iterator[list[Item]]:
    items = [Item(f"records.jsonl:{i}", i) for i in range(1, count + 1)]
    return iter([items[at : at + size] for at in range(0, count, size)])


def squares(chunk: Sequence[Item]) -> list[int]:
    return [item.value**2 for item in chunk]


def map_all(function: Callable, count: int, workers: int) -> list[int]:
    pairs = worker_pool.map_in_order(function, make_chunks(count), workers)
    return [result for _, results in pairs for result in results]


@pytest.mark.parametrize(
    ("count", "workers"), [*((count, 1) for count in (0, 1, 4, 5, 103)), (0, 2), (4, 2), (5, 2), (1, 3), (103, 3)]
)
def test_results_are_in_the_order_of_the_chunks(count: int, workers: int) -> None:
    def slow_first_chunk(chunk: Sequence[Item]) -> list[int]:
        time.sleep(0.02 if chunk[0].value == 1 else 0)
        return squares(chunk)

    assert map_all(slow_first_chunk, count, workers) == [i**2 for i in range(1, count + 1)]


def test_randomly_killed_workers_change_nothing(seed: int, tmp_path: Path) -> None:
    draw, parent = random.Random(seed), os.getpid()
    for trial in range(3):
        victim, marker = draw.randrange(1, 61), tmp_path / str(trial)
        number = draw.choice([signal.SIGKILL, signal.SIGTERM])

        def work(chunk, victim=victim, marker=marker, number=number):
            if any(item.value == victim for item in chunk) and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), number)
            return squares(chunk)

        started = time.monotonic()
        assert map_all(work, 60, 2) == [i**2 for i in range(1, 61)]
        assert time.monotonic() - started < HANG_SECONDS
        assert marker.exists()
    assert os.getpid() == parent


def test_a_record_that_kills_its_worker_twice_is_named() -> None:
    def work(chunk):
        if any(item.value == 30 for item in chunk):
            os.kill(os.getpid(), signal.SIGKILL)
        return squares(chunk)

    with pytest.raises(DataError, match=r"^records\.jsonl:30: encoding this record ends its worker process"):
        map_all(work, 60, 2)


def test_a_record_that_never_ends_is_named() -> None:
    def work(chunk):
        if any(item.value == 7 for item in chunk):
            time.sleep(600)
        return squares(chunk)

    pool, started = worker_pool.WorkerPool(work, 2, chunk_seconds=0.5, record_seconds=0.5), time.monotonic()
    try:
        with pytest.raises(DataError, match=r"records\.jsonl:7: encoding this record"):
            list(pool.map(make_chunks(20)))
    finally:
        pool.close()
    assert time.monotonic() - started < HANG_SECONDS


def test_an_error_in_a_worker_is_raised_unchanged_in_the_parent() -> None:
    def work(chunk):
        raise DataError(f"{chunk[0].where}: no")

    with pytest.raises(DataError, match=r"records\.jsonl:\d+: no"):
        map_all(work, 60, 2)


def test_no_worker_outlives_a_closed_pool() -> None:
    pool = worker_pool.WorkerPool(squares, 3)
    pids = [worker.process.pid for worker in pool._workers]
    results = pool.map(make_chunks(400))
    next(results)
    results.close()
    pool.close()
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
pool = worker_pool.WorkerPool(lambda chunk: [1] * len(chunk), 3)
print(*[worker.process.pid for worker in pool._workers], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_when_their_parent_is_killed() -> None:
    root = str(ROOT)
    parent = subprocess.run([sys.executable, "-c", ORPHANS], capture_output=True, text=True, cwd=root, timeout=60)
    pids = [int(pid) for pid in parent.stdout.split()]
    assert len(pids) == 3, parent.stderr
    deadline = time.monotonic() + HANG_SECONDS
    for pid in pids:
        while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1][:3]:
            assert time.monotonic() < deadline, "a worker outlived its parent"
            time.sleep(0.05)


def write_records(folder: Path, count: int) -> Path:
    draw = random.Random(0)
    lines = []
    for i in range(count):
        words = " ".join(draw.choices(["one", "zwei", "trois", "é😀", "<|im_end|>"], k=draw.randrange(1, 30)))
        record = {"prompt": f"{i} {words}", "completion": words if i % 17 else ""}
        lines.append(json.dumps(record) if i % 23 else '{"broken')
    path = folder / "records.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("parallel", ["true", "false"])
def test_workers_prepare_the_data_that_one_process_prepares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parallel: str
) -> None:
    """The tokenizer's own threads, used before the fork, must not make a worker wait for them."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", parallel)
    monkeypatch.setenv("QLORA_CACHE", "")
    monkeypatch.setattr(encode_records, "CHUNK_RECORDS", 32)
    data = Data.model_validate({"train": str(write_records(tmp_path, 400)), "max_length": 300, "overlong": "truncate"})
    prepared, progress = [], list[tuple[int, ...]]()
    for count in (1, 3):
        monkeypatch.setattr(worker_pool, "available_workers", lambda count=count: count)
        prepared.append(
            prepare(
                data, Encoder(make_tokenizer("bytes", "chatml")), 0, progress=lambda *counts: progress.append(counts)
            )
        )
    one, three = prepared
    assert one.report == three.report and one.report.dropped["not JSON"] == 18 and one.report.control_rows > 100
    for examples, others in ((one.train, three.train), (one.eval, three.eval)):
        for a, b in zip(examples, others, strict=True):
            assert a.where == b.where and a.origins == b.origins and a.boundaries == b.boundaries
            assert np.array_equal(a.input_ids, b.input_ids) and np.array_equal(a.labels, b.labels)
    assert progress == [(256, 400), (256, 400)]  # of the lines of the file


def test_a_small_data_set_starts_no_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_pool, "available_workers", lambda: 4)
    monkeypatch.setattr(worker_pool, "WorkerPool", None)
    data = Data.model_validate({"train": str(write_records(tmp_path, 100)), "max_length": 300})
    assert prepare(data, Encoder(make_tokenizer("bytes", "chatml")), 0).report.rows == 100


PEAK_MEMORY = """
import json, sys
from pathlib import Path
sys.path.insert(0, {paths!r})
from support.tokenizers import make_tokenizer
from qlora.data import Data
from qlora.data.prepare import prepare
from qlora.data.conversations.encoder import Encoder
def peak_bytes(path):
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    data = Data.model_validate({{"train": path, "max_length": 512, "eval_fraction": 0.01}})
    prepared = prepare(data, Encoder(make_tokenizer("bytes", "chatml")), 0)
    lines = Path("/proc/self/status").read_text().splitlines()  # ru_maxrss includes the parent's
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return peak, prepared.report.kept, prepared.report.tokens
print(json.dumps([peak_bytes(path) for path in {files!r}]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_peak_memory_does_not_grow_with_the_records(tmp_path: Path) -> None:
    """6,000 more records may take 200 bytes each (keys, lengths, order: 110 measured), not the 2,600 of objects."""
    line, counts = json.dumps({"text": "word " * 20 + "{}"}), (1_000, 7_000)
    for count in counts:
        (tmp_path / f"{count}.jsonl").write_text("\n".join(line.replace("{}", str(i)) for i in range(count)))
    code = PEAK_MEMORY.format(paths=str(TESTS), files=[str(tmp_path / f"{count}.jsonl") for count in counts])
    root = str(ROOT)
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=300)
    assert child.returncode == 0, child.stderr
    (small, *_), (large, *_) = results = json.loads(child.stdout)
    assert all(kept == count and tokens > 100 * count for (_, kept, tokens), count in zip(results, counts, strict=True))
    assert large - small < 200 * 6_000 + 8 * 2**20  # 8 MiB: the allocator varies between runs
