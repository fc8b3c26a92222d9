"""Large sources: a JSON array is read piece by piece, Parquet and hub sets row by row; memory is that of a few rows."""

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
from qlora.data.reading.resolve_paths import Located
from qlora.data.types import RecordError
from qlora.errors import DataError

LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")


def items(text: str | bytes) -> list:
    raw = text if isinstance(text, bytes) else text.encode()
    return [str(item) if isinstance(item, RecordError) else item for item in json_array.items(io.BytesIO(raw))]


@pytest.mark.parametrize("piece_bytes", [1, 2, 3, 7, 64, 1000, 2**20])
def test_wherever_the_pieces_end_the_objects_are_the_same(piece_bytes, monkeypatch):
    monkeypatch.setattr(json_array, "_PIECE_BYTES", piece_bytes)
    draw = random.Random(0)
    rows = [{"text": "é\n😀\\" * draw.randrange(20), "n": [1, 2.5, {"a": None}, -1e3, True]} for _ in range(30)]
    for indent in (None, 1):
        for ascii_only in (True, False):
            assert items(json.dumps(rows, ensure_ascii=ascii_only, indent=indent)) == rows
    broken = '[{"a": 1},\n{"a": NaN}, 71, {"a": [{"b": 1, "b": 2}], "c": "x"}, {"a": 2}]'
    assert items(broken) == [
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
        ('[{"a": "' + "b" * 5_000_000 + '"}]', "row too large: at most 4194304 bytes"),
    ],
)
def test_where_an_array_breaks_off_is_told(text, last):
    assert items(text)[-1].startswith(last)
    assert items("[]") == items(" [ ] \n") == []


PEAK = """
import sys
from pathlib import Path
def peak_bytes():
    lines = open("/proc/self/status").read().splitlines()  # ru_maxrss would be the parent's, where that is larger
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
from qlora.data.reading import readers
count = sum(1 for _ in readers.read_json(Path(sys.argv[1]), "rows.json"))
print(count, peak_bytes())
"""


@LINUX
def test_the_memory_for_an_array_does_not_grow_with_the_file(tmp_path):
    peaks = []
    for count in (2_000, 60_000):
        path = tmp_path / f"{count}.json"
        path.write_text(json.dumps([{"text": f"{i} " + "word " * 200} for i in range(count)]))
        made = subprocess.run([sys.executable, "-c", PEAK, path], capture_output=True, text=True, cwd=ROOT, check=True)
        found, peak = map(int, made.stdout.split())
        assert found == count
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 8 * 2**20  # of the 58 MiB by which the second file is larger


@pytest.fixture
def hub_set(tmp_path) -> Path:
    """A folder that `datasets` reads as it reads a set of the hub."""
    folder = tmp_path / "owner-name"
    folder.mkdir()
    (folder / "train.jsonl").write_text(
        "".join(json.dumps({"prompt": f"q{i}", "completion": "a"}) + "\n" for i in range(50))
    )
    return folder


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://localhost")


def test_a_hub_set_is_downloaded_unless_only_its_first_rows_are_wanted(hub_set, tmp_path, monkeypatch, online):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub-cache"))
    whole, some = (arrow.Hub(str(hub_set), None, limited) for limited in (False, True))
    some.__dict__["_builder"] = builder = datasets.load_dataset_builder(str(hub_set))
    builder.hash = "0123abcd"  # on the hub: the commit
    assert some.streams and not whole.streams
    rows = [list(one.rows()) for one in (whole, some)]
    assert rows[0] == rows[1] and len(rows[0]) == 50 and rows[0][6].where == f"{hub_set}/train:7"
    assert whole.sha256() != some.sha256() == some.sha256()
    builder.hash = "0123abce"
    assert some.sha256() != arrow.Hub(str(hub_set), None, True).sha256()


def test_a_set_larger_than_the_disk_is_streamed(hub_set, tmp_path, monkeypatch, online):
    builder = datasets.load_dataset_builder(str(hub_set))
    assert arrow.fits_disk(builder.info, tmp_path / "not" / "yet")
    builder.info.dataset_size, builder.hash = 2**60, "0123abcd"
    assert not arrow.fits_disk(builder.info, tmp_path)
    hub = arrow.Hub(str(hub_set), None, limited=False)
    hub.__dict__["_builder"] = builder
    assert hub.streams and len(list(hub.rows())) == 50


def test_offline_nothing_is_streamed_and_an_unknown_split_is_named(hub_set):
    hub = arrow.Hub(str(hub_set), "nowhere", limited=True)
    assert not hub.streams
    with pytest.raises(DataError, match="nowhere"):
        list(hub.rows())


def test_the_first_rows_of_a_hub_set_are_its_rows(hub_set):
    one = Source(path=str(hub_set), max_samples=7)
    rows = list(source.read(one, Located((), hub=str(hub_set)), (0, 0)))
    assert [row.fields["prompt"] for row in rows] == [f"q{i}" for i in range(7)]
