"""A kept base is the base: same bits and manifest, the original unread; whatever does not verify is made anew."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.paths import ROOT
from support.tiny_models import FAMILIES

from qlora.model import Model, quantized_cache
from qlora.model.load_base import Base, load
from qlora.model.weight_loader import WeightLoader
from qlora.quant import QUANTIZERS
from qlora.quant.nf4 import Nf4

Zoo = Callable[..., Path]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(quantized_cache, "SMALLEST_BYTES", 0)
    return tmp_path / "cache" / "base"


def loaded(folder: Path, quantizer: Any = None, dtype: str = "auto") -> Base:
    return load(Model(name=str(folder), dtype=dtype), quantizer or Nf4(), CPU)


def same(one: Base, other: Base) -> bool:
    ours, theirs = ({**base.model.state_dict()} for base in (one, other))
    assert ours.keys() == theirs.keys() and one.manifest == other.manifest
    return all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)


def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the original files may not be read."""
    monkeypatch.setattr(WeightLoader, "run", lambda *arguments: pytest.fail("the original was read"))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_second_start_reads_the_kept_base(zoo: Zoo, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = loaded(zoo(family))
    assert "kept in" in first.notes[0]
    unread(monkeypatch)
    second = loaded(zoo(family))
    assert same(first, second) and "earlier start" in second.notes[0]
    assert not any(parameter.requires_grad for parameter in second.model.parameters())
    if family == "llama-tied-bias":
        model: Any = second.model
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("other", [{"quantizer": Nf4(double=False)}, {"quantizer": Nf4(block=128)},
                                   {"quantizer": QUANTIZERS["fp4"]()}, {"dtype": "bfloat16"}], ids=str)  # fmt: skip
def test_another_way_to_store_is_another_base(zoo: Zoo, other: dict[str, Any]) -> None:
    loaded(zoo("llama"))
    found = loaded(zoo("llama"), **other)
    assert "kept in" in found.notes[0] and same(found, loaded(zoo("llama"), **other))


def test_other_weights_are_another_base_and_a_copied_folder_is_the_same(zoo: Zoo, home: Path, tmp_path: Path) -> None:
    first = loaded(zoo("llama"))
    copied = Path(shutil.copytree(zoo("llama"), tmp_path / "copied"))
    assert loaded(copied).manifest.sha256 == first.manifest.sha256
    assert len([path for path in home.iterdir() if path.is_dir() and path.name != "folders"]) == 1
    shutil.copy(zoo("llama", seed=1) / "model.safetensors", copied)
    changed = loaded(copied)
    assert changed.manifest.sha256 != first.manifest.sha256 and "kept in" in changed.notes[0]


def test_16_bit_bases_and_an_empty_setting_keep_nothing(zoo: Zoo, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert loaded(zoo("llama"), QUANTIZERS["dense"]()).notes == ()
    monkeypatch.setenv("QLORA_CACHE", "")
    assert loaded(zoo("llama")).notes == () and not home.exists()


def spoil(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position, os.SEEK_END if position < 0 else os.SEEK_SET)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 4]))


def reseal_with(entry: Path, **changes: Any) -> None:
    body = json.loads(entry.read_text())
    entry.write_text(json.dumps(body | changes))


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a bit in a part": lambda place: spoil(place / "part-00001.safetensors", -9),
    "a part is gone": lambda place: (place / "part-00001.safetensors").unlink(),
    "a bit in the entry": lambda place: spoil(place / "entry.json", 40),
    "another fingerprint": lambda place: reseal_with(place / "entry.json", sha256="0" * 64),
    "an empty entry": lambda place: (place / "entry.json").write_text(""),
    "an entry of other JSON": lambda place: (place / "entry.json").write_text("[1]"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_does_not_verify_is_made_anew(zoo: Zoo, home: Path, damage: str) -> None:
    first = loaded(zoo("llama"))
    (place,) = (path for path in home.iterdir() if path.is_dir() and path.name != "folders")
    DAMAGE[damage](place)
    second = loaded(zoo("llama"))
    assert same(first, second) and "does not verify" in second.notes[0] and "kept in" in second.notes[1]
    assert same(first, loaded(zoo("llama")))


def test_a_base_that_is_quantised_in_a_moment_is_not_kept(
    zoo: Zoo, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("QLORA_CACHE", str(home.parent))
    assert loaded(zoo("llama")).notes == () and not home.exists()


def test_a_folder_that_can_not_be_written_is_said_and_does_no_harm(zoo: Zoo, home: Path) -> None:
    home.parent.mkdir()
    home.write_text("a file")
    assert "not kept" in loaded(zoo("llama")).notes[0]


def test_processes_at_the_same_time_agree(zoo: Zoo, home: Path) -> None:
    code = (
        "import sys, torch; from qlora.model import Model; from qlora.model.load_base import load; "
        "from qlora.quant.nf4 import Nf4; from qlora.model import quantized_cache; quantized_cache.SMALLEST_BYTES = 0; "
        "print(load(Model(name=sys.argv[1]), Nf4(), torch.device('cpu')).manifest.sha256)"
    )
    command = [sys.executable, "-c", code, str(zoo("llama"))]
    root = {"PYTHONPATH": str(ROOT)}
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | root) for _ in range(2)]
    said = {child.communicate(timeout=120)[0] for child in children}
    assert len(said) == 1 and all(child.returncode == 0 for child in children)
    assert same(loaded(zoo("llama")), loaded(zoo("llama")))
