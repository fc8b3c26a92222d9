"""Large sources: JSON arrays are read in blocks, Parquet and hub data sets record by record, with little memory."""

import io
import json
import random
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from support.paths import ROOT

from qlora.data import Source
from qlora.data.reading import arrow, json_array, source
from qlora.data.reading.resolve_paths import ResolvedSource
from qlora.data.types import RecordError
from qlora.errors import DataError

LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")


def items(text: str | bytes, block_bytes: int = json_array.BLOCK_BYTES) -> list[dict | str]:
    raw = text if isinstance(text, bytes) else text.encode()
    read = json_array.items(io.BytesIO(raw), block_bytes)
    return [str(item) if isinstance(item, RecordError) else item for item in read]


@pytest.mark.parametrize("block_bytes", [1, 2, 3, 7, 64, 1000, 2**20])
def test_the_objects_do_not_depend_on_the_block_size(block_bytes: int) -> None:
    draw = random.Random(0)
    records = [{"text": "é\n😀\\" * draw.randrange(20), "n": [1, 2.5, {"a": None}, -1e3, True]} for _ in range(30)]
    for indent in (None, 1):
        for ascii_only in (True, False):
            assert items(json.dumps(records, ensure_ascii=ascii_only, indent=indent), block_bytes) == records
    broken = '[{"a": 1},\n{"a": NaN}, 71, {"a": [{"b": 1, "b": 2}], "c": "x"}, {"a": 2}]'
    assert items(broken, block_bytes) == [
        {"a": 1}, "NaN or Infinity: NaN is not JSON", "not an object: found a number", "duplicate key: 'b'", {"a": 2},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "last"),
    [
        ("[", "not JSON: the array does not end where the file ends"),
        ('[{"a": 1}', "not JSON: a comma or a bracket is missing at character 10; the rest of the file is not read"),
        ('[{"a": 1}] x', "not JSON: the array does not end where the file ends"),
        ('[{"a": 1}, {"a": ', "not JSON: Expecting value at character 18; the rest of the file is not read"),
        (b'[{"a": 1}, "\0"]', "NUL character: at byte 13; the rest of the file is not read"),
        (b'[{"a": "\xc3\xa9\xff"}]', "not UTF-8: at byte 11; the rest of the file is not read"),
        ("[" * 100_000, "nested too deep: at most 32 levels; the rest of the file is not read"),
        ('[{"a": "' + "b" * 5_000_000 + '"}]', "record too large: at most 4194304 bytes"),
    ],
)
def test_the_position_where_an_array_breaks_off_is_reported(text: str | bytes, last: str) -> None:
    assert items(text)[-1].startswith(last)
    assert items("[]") == items(" [ ] \n") == []


PEAK_MEMORY = """
import sys
from pathlib import Path
def peak_bytes():
    lines = open("/proc/self/status").read().splitlines()  # ru_maxrss includes the parent's
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
from qlora.data.reading import readers
for path in sys.argv[1:]:  # the larger file last: a peak only grows
    print(sum(1 for _ in readers.read_json(Path(path), "records.json")), peak_bytes())
"""


@LINUX
def test_the_memory_for_an_array_does_not_grow_with_the_file(tmp_path: Path) -> None:
    counts = (1_000, 21_000)
    paths = [tmp_path / f"{count}.json" for count in counts]
    for path, count in zip(paths, counts, strict=True):
        record = json.dumps({"text": "word " * 200})
        path.write_text(f"[{', '.join([record] * count)}]")
    command = [sys.executable, "-c", PEAK_MEMORY, *map(str, paths)]
    child = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    lines = [tuple(map(int, line.split())) for line in child.stdout.splitlines()]
    assert tuple(records for records, _ in lines) == counts
    assert lines[1][1] - lines[0][1] < 8 * 2**20  # the second file is 19 MiB larger


@pytest.fixture
def hub_set(tmp_path: Path) -> Path:
    """A folder that `datasets` reads like a hub data set."""
    folder = tmp_path / "owner-name"
    folder.mkdir()
    (folder / "train.jsonl").write_text(
        "".join(json.dumps({"prompt": f"q{i}", "completion": "a"}) + "\n" for i in range(50))
    )
    return folder


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://localhost")


def test_a_hub_set_is_downloaded_unless_only_its_first_records_are_read(
    hub_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, online: None
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub-cache"))
    downloaded, streamed = (arrow.HubDataset(str(hub_set), None, limited) for limited in (False, True))
    streamed.__dict__["_builder"] = builder = datasets.load_dataset_builder(str(hub_set))
    builder.hash = "0123abcd"  # on the hub: the commit
    assert streamed.is_streamed and not downloaded.is_streamed
    records, others = list(downloaded.records()), list(streamed.records())
    assert records == others and len(records) == 50 and records[6].where == f"{hub_set}/train:7"
    assert downloaded.sha256() != streamed.sha256() == streamed.sha256()
    builder.hash = "0123abce"
    assert streamed.sha256() != arrow.HubDataset(str(hub_set), None, True).sha256()


def test_a_set_larger_than_the_disk_is_streamed(
    hub_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, online: None
) -> None:
    builder = datasets.load_dataset_builder(str(hub_set))
    assert arrow.fits_disk(builder.info, tmp_path / "not" / "yet")
    builder.info.dataset_size, builder.hash = 2**60, "0123abcd"
    assert not arrow.fits_disk(builder.info, tmp_path)
    hub = arrow.HubDataset(str(hub_set), None, limited=False)
    hub.__dict__["_builder"] = builder
    assert hub.is_streamed and len(list(hub.records())) == 50


def test_offline_nothing_is_streamed_and_an_unknown_split_is_named(hub_set: Path) -> None:
    hub = arrow.HubDataset(str(hub_set), "nowhere", limited=True)
    assert not hub.is_streamed
    with pytest.raises(DataError, match="nowhere"):
        list(hub.records())


def test_max_samples_reads_the_first_records_of_a_hub_set(hub_set: Path) -> None:
    section = Source(path=str(hub_set), max_samples=7)
    records = list(source.read_records(section, ResolvedSource((), hub=str(hub_set)), (0, 0)))
    assert [record.fields["prompt"] for record in records] == [f"q{i}" for i in range(7)]
