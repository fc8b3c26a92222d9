"""Prepared data is found by what it was made from: the same again is a hit, any change a miss, damage is made good."""

import json
import os
import random
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.paths import ROOT, SHARED, TESTS
from support.tokenizers import template_text, tokenizer_of
from transformers import PreTrainedTokenizerFast

from qlora.data import Data
from qlora.data.batching import cache, column_store
from qlora.data.batching.collate import collate
from qlora.data.batching.packing import pack
from qlora.data.conversations.encoder import Encoder
from qlora.data.prepare import Prepared, prepare
from qlora.errors import DataError

BEFORE, KEPT, NOT_KEPT = "prepared before", "prepared, and kept", "not kept"


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(tokenizer_of("bytes", "chatml"))


@pytest.fixture
def rows(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"Question {i}", "completion": f"Answer {i} é😀" * (1 + i % 5)} for i in range(60)]
    path.write_text("\n".join([*map(json.dumps, lines), '{"broken', '{"prompt": "x", "completion": ""}']))
    return path


def section(path, **settings) -> Data:
    return Data.model_validate({"train": str(path), "max_length": 256, **settings})


def note(made: Prepared) -> str:
    return made.report.notes[-1]


def same(one: Prepared, two: Prepared) -> bool:
    """Every row and every count, the note on where it comes from aside."""
    reports = [{**made.report.as_json(), "notes": None} for made in (one, two)]
    return reports[0] == reports[1] and all(
        a.where == b.where and a.parts == b.parts and a.boundaries == b.boundaries
        and np.array_equal(a.input_ids, b.input_ids) and np.array_equal(a.labels, b.labels)
        and a.input_ids.dtype == b.input_ids.dtype == a.labels.dtype == b.labels.dtype == np.int32
        for kept, found in ((one.train, two.train), (one.eval, two.eval))
        for a, b in zip(kept, found, strict=True)
    )  # fmt: skip


@pytest.mark.parametrize("packing", [True, False])
def test_the_second_time_is_a_hit_and_gives_the_same(rows, encoder, packing, monkeypatch):
    first = prepare(section(rows, packing=packing), encoder, 0)
    second = prepare(section(rows, packing=packing), Encoder(tokenizer_of("bytes", "chatml")), 0)
    assert KEPT in note(first) and BEFORE in note(second) and same(first, second)
    monkeypatch.setenv("QLORA_CACHE", "")
    third = prepare(section(rows, packing=packing), encoder, 0)
    assert NOT_KEPT in note(third) and same(first, third)
    assert len(first.train) and [e.where for e in first.train[1:3]] == [first.train[1].where, first.train[2].where]
    assert first.train[-1].where == first.train[len(first.train) - 1].where
    with pytest.raises(IndexError):
        first.train[len(first.train)]


def test_forty_changes_of_one_byte_miss(rows, encoder):
    assert KEPT in note(prepare(section(rows), encoder, 0))
    whole, draw = rows.read_bytes(), random.Random(0)
    for _ in range(40):
        changed = bytearray(whole)
        place = draw.randrange(len(changed))
        changed[place] ^= 1 << draw.randrange(8)
        rows.write_bytes(changed)
        assert KEPT in note(prepare(section(rows), encoder, 0)), f"byte {place}"
    rows.write_bytes(whole)
    assert BEFORE in note(prepare(section(rows), encoder, 0))


@pytest.mark.parametrize("option", [
    {"max_length": 255}, {"overlong": "truncate"}, {"packing": False}, {"train_on": "last"}, {"eval_fraction": 0.1},
    {"format": "completion"}, {"train": [{"path": "rows.jsonl", "max_samples": 61}]},
    {"train": [{"path": "rows.jsonl", "weight": 2}]}, {"train": [{"path": "./rows.jsonl"}]},
    {"train": [{"path": "rows.jsonl", "columns": {"prompt": "prompt"}}]}, {"eval": "rows.jsonl"},
], ids=str)  # fmt: skip
def test_every_option_is_part_of_the_key(rows, encoder, option, monkeypatch):
    monkeypatch.chdir(rows.parent)
    prepare(section("rows.jsonl"), encoder, 0)
    made = prepare(Data.model_validate({"train": "rows.jsonl", "max_length": 256, **option}), encoder, 0)
    assert KEPT in note(made)
    assert KEPT in note(prepare(section("rows.jsonl"), encoder, 1)), "the seed holds out other rows"


def test_every_part_of_the_tokenizer_and_the_template_is_part_of_the_key(rows, tmp_path):
    def changed(tokenizer, change):
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        change(spec)
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(spec))
        made = PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token=tokenizer.eos_token)
        made.chat_template = tokenizer.chat_template
        return made

    def swap_ids(spec):
        vocabulary = spec["model"]["vocab"]
        a, b = sorted(vocabulary)[-2:]
        vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]

    plain = changed(tokenizer_of("bytes", "chatml"), lambda spec: None)
    assert KEPT in note(prepare(section(rows), Encoder(plain), 0))
    assert BEFORE in note(prepare(section(rows), Encoder(plain), 0))
    others = [
        changed(plain, swap_ids),
        changed(plain, lambda spec: spec["model"]["merges"].pop()),
        changed(plain, lambda spec: spec["added_tokens"][-1].update(special=not spec["added_tokens"][-1]["special"])),
        changed(plain, lambda spec: spec.update(normalizer={"type": "Lowercase"})),
    ]
    for tokenizer in others:
        assert KEPT in note(prepare(section(rows), Encoder(tokenizer), 0))
    template = changed(plain, lambda spec: None)
    template.chat_template = template_text("chatml") + " "
    assert Encoder(template).sha256 != Encoder(plain).sha256
    ending = changed(plain, lambda spec: None)
    ending.eos_token = "<|im_start|>"
    assert Encoder(ending).sha256 != Encoder(plain).sha256


def test_the_code_of_the_package_is_part_of_the_key(tmp_path):
    """The digest is taken of the files themselves: no version constant that someone must remember to raise."""
    package = shutil.copytree(cache.DATA_PACKAGE, tmp_path / "data", ignore=shutil.ignore_patterns("__pycache__"))
    assert cache.code_sha256(package) == cache.code_sha256()
    (package / "formats" / "alpaca.py").write_text("x = 1\n")
    assert cache.code_sha256(package) != cache.code_sha256()


def entry_of(kept: Path) -> Path:
    return next(path for path in kept.iterdir() if path.is_dir())


@pytest.mark.parametrize("name", [*column_store.KINDS, "entry"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "longer"])
def test_a_damaged_entry_is_made_anew_without_a_word(rows, encoder, kept, name, damage):
    first = prepare(section(rows), encoder, 0)
    whole = [*first.train, *first.eval]
    path = entry_of(kept) / ("entry.json" if name == "entry" else f"{name}.bin")
    content = bytearray(path.read_bytes())
    path.unlink()
    content[len(content) // 2] ^= 4
    if damage != "gone":
        path.write_bytes({"flip": content, "cut": content[:-1], "longer": content + b"\0"}[damage])
    second = prepare(section(rows), encoder, 0)
    assert KEPT in note(second) and same(second, prepare(section(rows), encoder, 0))
    assert [e.where for e in whole] == [e.where for e in (*second.train, *second.eval)]
    assert BEFORE in note(prepare(section(rows), encoder, 0))


@pytest.mark.parametrize("obstacle", ["a file in its place", "a folder below a file", "read-only"])
def test_without_a_writable_folder_it_works_and_says_so(rows, encoder, tmp_path, monkeypatch, obstacle):
    place = tmp_path / "blocked"
    if obstacle == "read-only":
        if os.geteuid() == 0:
            pytest.skip("root writes everywhere")
        place.mkdir()
        place.chmod(stat.S_IRUSR | stat.S_IXUSR)
    else:
        place.write_text("")
        place = place / "below" if obstacle.startswith("a folder") else place
    monkeypatch.setenv("QLORA_CACHE", str(place))
    made = prepare(section(rows), encoder, 0)
    assert NOT_KEPT in note(made) and len(made.train) > 0 and collate(made.train[:2], 0).tokens > 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("name", column_store.KINDS)
def test_a_full_disk_costs_the_entry_and_nothing_else(rows, encoder, kept, name, monkeypatch):
    monkeypatch.setattr(
        column_store, "file_of", lambda folder, n: Path("/dev/full") if n == name else folder / f"{n}.bin"
    )
    made = prepare(section(rows), encoder, 0)
    assert NOT_KEPT in note(made) and "No space left" in note(made)
    assert [path for path in kept.iterdir() if path.is_dir()] == []
    monkeypatch.undo()
    os.environ["QLORA_CACHE"] = str(kept.parent)
    assert same(made, prepare(section(rows), encoder, 0))


def test_an_error_leaves_nothing_behind_and_is_not_kept(tmp_path, encoder, kept):
    (tmp_path / "empty.jsonl").write_text(" \n")
    for _ in range(2):
        with pytest.raises(DataError, match="no rows in this data set"):
            prepare(section(tmp_path / "empty.jsonl"), encoder, 0)
    assert [path for path in kept.iterdir() if path.is_dir()] == []


def test_a_file_that_changes_while_it_is_read_is_an_error(rows, encoder, kept):
    def meddle(count: int) -> None:
        with rows.open("a") as file:
            file.write('\n{"prompt": "late", "completion": "late"}')

    rows.write_text("\n".join(rows.read_text().splitlines()[:2] * 200))
    with pytest.raises(DataError, match=r"rows\.jsonl: changed while it was read"):
        prepare(section(rows), encoder, 0, progress=meddle)


def test_what_is_long_unused_or_half_written_is_swept_and_nothing_of_others(rows, encoder, kept):
    prepare(section(rows), encoder, 0)
    old = entry_of(kept)
    os.utime(old / "entry.json", (0, 0))
    (kept / "notes.txt").write_text("the user's own")
    os.utime(kept / "notes.txt", (0, 0))
    prepare(section(rows), encoder, 1)
    assert not old.exists() and (kept / "notes.txt").exists()
    current = entry_of(kept)
    left = kept / f".partial-{current.name}-abc"
    left.mkdir()
    (current / "ids.bin").write_bytes(b"")
    prepare(section(rows), encoder, 1)
    assert not left.exists() and current.exists()


TWO_AT_ONCE = """
import sys
sys.path[:0] = {paths!r}
from support.tokenizers import tokenizer_of
from qlora.data import Data
from qlora.data.prepare import prepare
from qlora.data.conversations.encoder import Encoder
section = Data.model_validate({{"train": {path!r}, "max_length": 256}})
made = prepare(section, Encoder(tokenizer_of("bytes", "chatml")), 0)
print(made.report.notes[-1])
"""


def test_processes_that_start_together_prepare_once(rows, kept):
    code = TWO_AT_ONCE.format(paths=[str(TESTS), str(ROOT)], path=str(rows))
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    notes = sorted(run.communicate(timeout=120)[0] for run in runs)
    assert [KEPT in line for line in notes].count(True) == 1
    assert [BEFORE in line for line in notes].count(True) == 2


def test_rows_from_the_map_are_those_that_packing_in_memory_makes(rows, encoder):
    apart, packed = (prepare(section(rows, packing=flag), encoder, 0) for flag in (False, True))
    for one, two in zip(packed.train, pack(list(apart.train), 256), strict=True):
        assert one.where == two.where and one.parts == two.parts and one.boundaries == two.boundaries
        assert np.array_equal(one.input_ids, two.input_ids) and np.array_equal(one.labels, two.labels)


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")
def test_preparing_gsm8k_twice_hits_and_a_changed_byte_misses(tmp_path):
    from transformers import AutoTokenizer

    encoder = Encoder(AutoTokenizer.from_pretrained(SHARED / "stories260K"))
    path = tmp_path / "gsm8k.jsonl"
    lines = (SHARED / "gsm8k" / "test.jsonl").read_bytes().splitlines(keepends=True)[:200]
    path.write_bytes(b"".join(lines))
    data = Data.model_validate({"train": str(path), "max_length": 1024})
    assert KEPT in note(prepare(data, encoder, 0))
    assert BEFORE in note(prepare(data, encoder, 0))
    path.write_bytes(b"".join(lines).replace(b"4", b"5", 1))
    assert KEPT in note(prepare(data, encoder, 0))
