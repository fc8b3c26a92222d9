"""The cache of prepared data: the same inputs are a hit, any change is a miss, a damaged entry is built again."""

import json
import os
import random
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.child_processes import Child, Notify
from support.paths import SHARED
from support.tokenizers import make_tokenizer, template_text
from transformers import PreTrainedTokenizerFast

from qlora.data import Data
from qlora.data.batching import cache, column_store
from qlora.data.batching.collate import collate
from qlora.data.batching.packing import pack
from qlora.data.conversations.encoder import Encoder
from qlora.data.prepare import Prepared, prepare
from qlora.errors import DataError

BEFORE, KEPT, NOT_KEPT = "prepared before", "prepared, and kept", "not kept"
WRITTEN = [name for name in column_store.DTYPES if name not in ("branches", "sides")]  # of which the records have none


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(make_tokenizer("bytes", "chatml"))


@pytest.fixture
def records_file(tmp_path: Path) -> Path:
    path = tmp_path / "records.jsonl"
    lines = [{"prompt": f"Question {i}", "completion": f"Answer {i} é😀" * (1 + i % 5)} for i in range(30)]
    path.write_text("\n".join([*map(json.dumps, lines), '{"broken', '{"prompt": "x", "completion": ""}']))
    return path


def section(path: Path | str, **settings: object) -> Data:
    return Data.model_validate({"train": str(path), "max_length": 256, **settings})


def note(prepared: Prepared) -> str:
    return prepared.report.notes[-1]


def same(one: Prepared, two: Prepared) -> bool:
    """Whether all examples and counts are equal; notes may differ."""
    reports = [{**prepared.report.as_json(), "notes": None} for prepared in (one, two)]
    return reports[0] == reports[1] and all(
        a.where == b.where and a.origins == b.origins and a.boundaries == b.boundaries
        and np.array_equal(a.input_ids, b.input_ids) and np.array_equal(a.labels, b.labels)
        and a.input_ids.dtype == b.input_ids.dtype == a.labels.dtype == b.labels.dtype == np.int32
        for examples, others in ((one.train, two.train), (one.eval, two.eval))
        for a, b in zip(examples, others, strict=True)
    )  # fmt: skip


@pytest.mark.parametrize("packing", [True, False])
def test_the_second_time_is_a_hit_with_the_same_data(
    records_file: Path, encoder: Encoder, packing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(section(records_file, packing=packing), encoder, 0)
    second = prepare(section(records_file, packing=packing), Encoder(make_tokenizer("bytes", "chatml")), 0)
    assert KEPT in note(first) and BEFORE in note(second) and same(first, second)
    monkeypatch.setenv("QLORA_CACHE", "")
    third = prepare(section(records_file, packing=packing), encoder, 0)
    assert NOT_KEPT in note(third) and same(first, third)
    assert len(first.train) and [e.where for e in first.train[1:3]] == [first.train[1].where, first.train[2].where]
    assert first.train[-1].where == first.train[len(first.train) - 1].where
    with pytest.raises(IndexError):
        first.train[len(first.train)]


def test_changes_of_one_byte_miss(records_file: Path, encoder: Encoder, seed: int) -> None:
    assert KEPT in note(prepare(section(records_file), encoder, 0))
    content, draw = records_file.read_bytes(), random.Random(seed)
    for _ in range(10):
        changed = bytearray(content)
        at = draw.randrange(len(changed))
        changed[at] ^= 1 << draw.randrange(8)
        records_file.write_bytes(changed)
        assert KEPT in note(prepare(section(records_file), encoder, 0)), f"byte {at}"
    records_file.write_bytes(content)
    assert BEFORE in note(prepare(section(records_file), encoder, 0))


@pytest.mark.parametrize("option", [
    {"max_length": 255}, {"overlong": "truncate"}, {"packing": False}, {"train_on": "last"}, {"eval_fraction": 0.1},
    {"format": "completion"}, {"train": [{"path": "records.jsonl", "max_samples": 31}]},
    {"train": [{"path": "records.jsonl", "weight": 2}]}, {"train": [{"path": "./records.jsonl"}]},
    {"train": [{"path": "records.jsonl", "columns": {"prompt": "prompt"}}]}, {"eval": "records.jsonl"},
], ids=str)  # fmt: skip
def test_every_option_is_part_of_the_key(
    records_file: Path, encoder: Encoder, option: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(records_file.parent)
    prepare(section("records.jsonl"), encoder, 0)
    prepared = prepare(Data.model_validate({"train": "records.jsonl", "max_length": 256, **option}), encoder, 0)
    assert KEPT in note(prepared)
    assert KEPT in note(prepare(section("records.jsonl"), encoder, 1)), "the seed holds out other examples"


def test_tokenizer_and_template_are_part_of_the_key(records_file: Path, tmp_path: Path) -> None:
    def changed(tokenizer: PreTrainedTokenizerFast, change: Callable[[dict], object]) -> PreTrainedTokenizerFast:
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        change(spec)
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(spec))
        copy = PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token=tokenizer.eos_token)
        copy.chat_template = tokenizer.chat_template
        return copy

    def swap_ids(spec: dict) -> None:
        vocabulary = spec["model"]["vocab"]
        a, b = sorted(vocabulary)[-2:]
        vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]

    plain = changed(make_tokenizer("bytes", "chatml"), lambda spec: None)
    assert KEPT in note(prepare(section(records_file), Encoder(plain), 0))
    assert BEFORE in note(prepare(section(records_file), Encoder(plain), 0))
    others = [
        changed(plain, swap_ids),
        changed(plain, lambda spec: spec["model"]["merges"].pop()),
        changed(plain, lambda spec: spec["added_tokens"][-1].update(special=not spec["added_tokens"][-1]["special"])),
        changed(plain, lambda spec: spec.update(normalizer={"type": "Lowercase"})),
    ]
    for tokenizer in others:
        assert KEPT in note(prepare(section(records_file), Encoder(tokenizer), 0))
    template = changed(plain, lambda spec: None)
    template.chat_template = template_text("chatml") + " "
    assert Encoder(template).sha256 != Encoder(plain).sha256
    ending = changed(plain, lambda spec: None)
    ending.eos_token = "<|im_start|>"
    assert Encoder(ending).sha256 != Encoder(plain).sha256


def test_the_code_of_the_package_is_part_of_the_key(tmp_path: Path) -> None:
    """The digest is of the source files, so that no version constant has to be raised by hand."""
    package = shutil.copytree(cache.DATA_PACKAGE, tmp_path / "data", ignore=shutil.ignore_patterns("__pycache__"))
    assert cache.code_sha256(package) == cache.code_sha256()
    (package / "formats" / "alpaca.py").write_text("x = 1\n")
    assert cache.code_sha256(package) != cache.code_sha256()


def entry_of(cache_home: Path) -> Path:
    return next(path for path in cache_home.iterdir() if path.is_dir())


@pytest.mark.sample(of=8, every=("name", "damage"))
@pytest.mark.parametrize("name", [*WRITTEN, "entry"])
@pytest.mark.parametrize("damage", ["flipped bit", "shorter", "missing", "longer"])
def test_a_damaged_entry_is_built_again(
    records_file: Path, encoder: Encoder, cache_home: Path, name: str, damage: str
) -> None:
    first = prepare(section(records_file), encoder, 0)
    examples = [*first.train, *first.eval]
    path = entry_of(cache_home) / ("entry.json" if name == "entry" else f"{name}.bin")
    content = bytearray(path.read_bytes())
    path.unlink()
    content[len(content) // 2] ^= 4
    damaged = {"flipped bit": content, "shorter": content[:-1], "longer": content + b"\0"}
    if damage != "missing":
        path.write_bytes(damaged[damage])
    second = prepare(section(records_file), encoder, 0)
    assert KEPT in note(second) and same(second, prepare(section(records_file), encoder, 0))
    assert [e.where for e in examples] == [e.where for e in (*second.train, *second.eval)]
    assert BEFORE in note(prepare(section(records_file), encoder, 0))


@pytest.mark.parametrize("obstacle", ["a file of that name", "a folder below a file", "read-only"])
def test_without_a_writable_folder_data_is_prepared_with_a_note(
    records_file: Path, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, obstacle: str
) -> None:
    folder = tmp_path / "blocked"
    if obstacle == "read-only":
        if os.geteuid() == 0:
            pytest.skip("root writes everywhere")
        folder.mkdir()
        folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    else:
        folder.write_text("")
        folder = folder / "below" if obstacle.startswith("a folder") else folder
    monkeypatch.setenv("QLORA_CACHE", str(folder))
    prepared = prepare(section(records_file), encoder, 0)
    assert NOT_KEPT in note(prepared) and len(prepared.train) > 0 and collate(prepared.train[:2], 0).tokens > 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.sample(of=3)
@pytest.mark.parametrize("name", WRITTEN)
def test_on_a_full_disk_data_is_prepared_and_not_kept(
    records_file: Path, encoder: Encoder, cache_home: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        column_store, "column_path", lambda folder, n: Path("/dev/full") if n == name else folder / f"{n}.bin"
    )
    prepared = prepare(section(records_file), encoder, 0)
    assert NOT_KEPT in note(prepared) and "No space left" in note(prepared)
    assert [path for path in cache_home.iterdir() if path.is_dir()] == []
    monkeypatch.undo()
    os.environ["QLORA_CACHE"] = str(cache_home.parent)
    assert same(prepared, prepare(section(records_file), encoder, 0))


def test_an_error_leaves_no_entry(tmp_path: Path, encoder: Encoder, cache_home: Path) -> None:
    (tmp_path / "empty.jsonl").write_text(" \n")
    for _ in range(2):
        with pytest.raises(DataError, match="no records in this data set"):
            prepare(section(tmp_path / "empty.jsonl"), encoder, 0)
    assert [path for path in cache_home.iterdir() if path.is_dir()] == []


def test_a_file_that_changes_while_it_is_read_is_an_error(
    records_file: Path, encoder: Encoder, cache_home: Path
) -> None:
    def change_file(count: int, total: int | None) -> None:
        with records_file.open("a") as file:
            file.write('\n{"prompt": "late", "completion": "late"}')

    records_file.write_text("\n".join(records_file.read_text().splitlines()[:2] * 200))
    with pytest.raises(DataError, match=r"records\.jsonl: changed while it was read"):
        prepare(section(records_file), encoder, 0, progress=change_file)


def test_unused_and_unfinished_entries_are_removed_and_no_other_file(
    records_file: Path, encoder: Encoder, cache_home: Path
) -> None:
    prepare(section(records_file), encoder, 0)
    old = entry_of(cache_home)
    os.utime(old / "entry.json", (0, 0))
    (cache_home / "notes.txt").write_text("a user's file")
    os.utime(cache_home / "notes.txt", (0, 0))
    prepare(section(records_file), encoder, 1)
    assert not old.exists() and (cache_home / "notes.txt").exists()
    current = entry_of(cache_home)
    unfinished = cache_home / f".partial-{current.name}-abc"
    unfinished.mkdir()
    (current / "ids.bin").write_bytes(b"")
    prepare(section(records_file), encoder, 1)
    assert not unfinished.exists() and current.exists()


def test_processes_that_start_together_prepare_once(records_file: Path, cache_home: Path, tmp_path: Path) -> None:
    def prepare_alone(notify: Notify) -> None:
        notify(note(prepare(section(records_file), Encoder(make_tokenizer("bytes", "chatml")), 0)))

    children = [Child(prepare_alone, tmp_path / "log") for _ in range(3)]
    assert [child.wait() for child in children] == [0, 0, 0], (tmp_path / "log").read_text()
    notes = [line for child in children for line in child.lines()]
    assert [KEPT in line for line in notes].count(True) == 1
    assert [BEFORE in line for line in notes].count(True) == 2


def test_the_memory_map_has_the_sequences_of_packing_in_memory(records_file: Path, encoder: Encoder) -> None:
    apart, packed = (prepare(section(records_file, packing=flag), encoder, 0) for flag in (False, True))
    for one, two in zip(packed.train, pack(list(apart.train), 256), strict=True):
        assert one.where == two.where and one.origins == two.origins and one.boundaries == two.boundaries
        assert np.array_equal(one.input_ids, two.input_ids) and np.array_equal(one.labels, two.labels)


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")
def test_preparing_gsm8k_twice_hits_and_a_changed_byte_misses(tmp_path: Path) -> None:
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
