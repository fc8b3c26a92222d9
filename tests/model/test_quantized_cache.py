"""A cached base has the bits and manifest of the checkpoint, which is not read; damaged entries are written again."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.child_processes import Child, Notify
from support.tiny_models import FAMILIES

from qlora.model import Model, quantized_cache
from qlora.model.linear_layers import frozen_linears
from qlora.model.load_base import Base, load
from qlora.model.module_tree import set_tensors
from qlora.model.weight_loader import WeightLoader
from qlora.quant import Quant, build_quantizer

Zoo = Callable[..., Path]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(quantized_cache, "MIN_BASE_BYTES", 0)
    return tmp_path / "cache" / "base"


def loaded(folder: Path, quantizer: Any = None, dtype: str = "auto") -> Base:
    return load(Model(name=str(folder), dtype=dtype), quantizer or build_quantizer(Quant()), CPU)


def same(one: Base, other: Base) -> bool:
    a, b = ({**base.model.state_dict()} for base in (one, other))
    assert a.keys() == b.keys() and one.manifest == other.manifest
    return all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test if the checkpoint is read."""
    monkeypatch.setattr(WeightLoader, "run", lambda *arguments: pytest.fail("the checkpoint was read"))


@pytest.mark.sample(of=3)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_second_start_reads_the_cached_base(zoo: Zoo, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = loaded(zoo(family))
    assert "cached in" in first.notes[0]
    forbid_reading(monkeypatch)
    second = loaded(zoo(family))
    assert same(first, second) and "earlier start" in second.notes[0]
    assert not any(parameter.requires_grad for parameter in second.model.parameters())
    if family == "llama-tied-bias":
        model: Any = second.model
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.sample(of=2)
@pytest.mark.parametrize(
    "other",
    [
        {"quantizer": build_quantizer(Quant(double=False))},
        {"quantizer": build_quantizer(Quant(block=128))},
        {"quantizer": build_quantizer(Quant(kind="fp4"))},
        {"dtype": "bfloat16"},
    ],
    ids=str,
)
def test_another_storage_format_is_another_entry(zoo: Zoo, other: dict[str, Any]) -> None:
    loaded(zoo("llama"))
    base = loaded(zoo("llama"), **other)
    assert "cached in" in base.notes[0] and same(base, loaded(zoo("llama"), **other))


def test_other_weights_are_another_entry_a_copied_folder_is_not(zoo: Zoo, cache_root: Path, tmp_path: Path) -> None:
    first = loaded(zoo("llama"))
    copied = Path(shutil.copytree(zoo("llama"), tmp_path / "copied"))
    assert loaded(copied).manifest.sha256 == first.manifest.sha256
    assert len([path for path in cache_root.iterdir() if path.is_dir() and path.name != "folders"]) == 1
    shutil.copy(zoo("llama", seed=1) / "model.safetensors", copied)
    changed = loaded(copied)
    assert changed.manifest.sha256 != first.manifest.sha256 and "cached in" in changed.notes[0]


def test_16_bit_bases_and_an_empty_setting_cache_nothing(
    zoo: Zoo, cache_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert loaded(zoo("llama"), build_quantizer(Quant(kind="dense"))).notes == ()
    monkeypatch.setenv("QLORA_CACHE", "")
    assert loaded(zoo("llama")).notes == () and not cache_root.exists()


def flip_bit(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position, os.SEEK_END if position < 0 else os.SEEK_SET)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 4]))


def edit_entry(entry: Path, **changes: Any) -> None:
    body = json.loads(entry.read_text())
    entry.write_text(json.dumps(body | changes))


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a bit in a part": lambda folder: flip_bit(folder / "part-00001.safetensors", -9),
    "a part is gone": lambda folder: (folder / "part-00001.safetensors").unlink(),
    "a bit in the entry": lambda folder: flip_bit(folder / "entry.json", 40),
    "another fingerprint": lambda folder: edit_entry(folder / "entry.json", sha256="0" * 64),
    "an empty entry": lambda folder: (folder / "entry.json").write_text(""),
    "an entry of other JSON": lambda folder: (folder / "entry.json").write_text("[1]"),
}


@pytest.mark.sample(of=2)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_written_again(zoo: Zoo, cache_root: Path, damage: str) -> None:
    first = loaded(zoo("llama"))
    (folder,) = (path for path in cache_root.iterdir() if path.is_dir() and path.name != "folders")
    DAMAGE[damage](folder)
    second = loaded(zoo("llama"))
    assert same(first, second) and "does not verify" in second.notes[0] and "cached in" in second.notes[1]
    assert same(first, loaded(zoo("llama")))


def test_a_small_base_is_not_cached(zoo: Zoo, cache_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("QLORA_CACHE", str(cache_root.parent))
    assert loaded(zoo("llama")).notes == () and not cache_root.exists()


def test_a_cache_that_cannot_be_written_is_only_a_note(zoo: Zoo, cache_root: Path) -> None:
    cache_root.parent.mkdir()
    cache_root.write_text("a file")
    assert "not cached" in loaded(zoo("llama")).notes[0]


def test_processes_at_the_same_time_agree(zoo: Zoo, cache_root: Path, tmp_path: Path) -> None:
    folder = zoo("llama")

    def work(notify: Notify) -> None:
        notify(loaded(folder).manifest.sha256)

    children = [Child(work, tmp_path / f"log-{number}") for number in range(2)]
    assert [child.wait() for child in children] == [0, 0], (tmp_path / "log-0").read_text()
    assert len({line for child in children for line in child.lines()}) == 1
    assert same(loaded(zoo("llama")), loaded(zoo("llama")))


def test_everything_in_an_entry_is_moved_to_the_device(zoo: Zoo) -> None:
    """A GPU's second start: embedding, norms and head are no frozen layers, and were once left on the host."""
    model, meta = loaded(zoo("llama-tied-bias")).model, torch.device("meta")  # stands for a GPU
    layers = {path: layer.describe() for path, layer in frozen_linears(model).items()}
    on_host = next(iter(layers))
    tensors = {name: value.detach().clone() for name, value in model.named_parameters()}
    set_tensors(model, tensors, layers, meta, lambda path: CPU if path == on_host else meta)
    model.tie_weights()
    devices = {name: value.device for name, value in model.named_parameters()}
    assert {name for name, device in devices.items() if device == CPU} == {
        name for name in devices if name.startswith(f"{on_host}.")
    }
