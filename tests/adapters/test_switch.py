"""Several adapters on one base: each acts exactly as it does alone, and no switch leaves a trace."""

import gc
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import qlora
from support.small_runs import recipe_of, run, write_rows
from support.tiny_models import FAMILIES
from torch import Tensor, nn

from qlora.adapters import ADAPTERS, peft_files
from qlora.adapters.inject import adapted, inject
from qlora.adapters.plain_lora import folded
from qlora.adapters.switch import AdapterSwitch
from qlora.errors import AdapterError
from qlora.model import Model
from qlora.model.load_base import Base, load
from qlora.quant import QUANTIZERS
from qlora.runs.load_run import load_with_adapters

Zoo = Callable[..., Path]
IDS = torch.randint(5, 250, (4, 24), generator=torch.Generator().manual_seed(0))
SHAPES = {"a": ("lora", 4, "all-linear"), "b": ("rslora", 8, "all-linear"), "c": ("lora", 2, ["q_proj", "down_proj"])}
CLOSE = {"rtol": 0, "atol": 1e-5}


def base_of(folder: Path, quantizer: str = "nf4") -> Base:
    return load(Model(name=str(folder), dtype="float32"), QUANTIZERS[quantizer](), torch.device("cpu"))


def adapter_folder(base_folder: Path, folder: Path, name: str) -> Path:
    """A strong random adapter for a base, as a folder."""
    base = base_of(base_folder)
    kind, rank, targets = SHAPES[name]
    leaves = {path.rpartition(".")[2] for path, _ in base.model.named_modules()}
    targets = targets if targets == "all-linear" or set(targets) <= leaves else "all-linear"
    adapter = ADAPTERS[kind](rank=rank, alpha=8.0)
    inject(base.model, adapter, targets, seed=ord(name))
    generator = torch.Generator().manual_seed(ord(name))
    with torch.no_grad():
        for layer in adapted(base.model).values():
            layer.B.copy_(torch.randn(layer.B.shape, generator=generator) * 0.1)
    manifest = base.manifest
    peft_files.write(
        folder, base.model, adapter, peft_files.Identity(manifest.name, manifest.revision, manifest.sha256)
    )
    return folder


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids).logits


class Held:
    """A base, a switch that holds a, b and c, and what each gives when it is attached alone."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.folders = {name: adapter_folder(model, folder / name, name) for name in SHAPES}
        self.base = base_of(model)
        self.switch = AdapterSwitch(self.base.model)
        self.alone: dict[str | None, Tensor] = {None: logits(self.base.model)}
        for name, place in self.folders.items():
            file = peft_files.read(place)
            self.switch.hold(name, peft_files.fitted(self.base.model, file, self.base.manifest.sha256)[0])
            fresh = base_of(model)
            peft_files.attach(fresh.model, file, fresh.manifest.sha256)
            self.alone[name] = logits(fresh.model)


@pytest.fixture(scope="module")
def held(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Held:
    return Held(zoo("llama-tied-bias"), tmp_path_factory.mktemp("held"))


def test_the_adapter_that_acts_is_the_one_that_was_named_bit_for_bit(held: Held) -> None:
    assert held.switch.names == ["a", "b", "c"]
    for name in ("a", "b", None, "c", "a", None):
        held.switch.use(name)
        assert held.switch.name == name and torch.equal(logits(held.base.model), held.alone[name])
    assert not torch.allclose(held.alone["a"], held.alone["b"]) and not torch.allclose(
        held.alone["c"], held.alone[None]
    )
    assert not adapted(held.base.model)  # the base alone is the base, no layer in between


@pytest.mark.parametrize("names", [("a", "b", "c", None), ("b", "b", "a", "b"), (None,) * 4, ("c", None, "a", "c")])
def test_each_row_of_a_batch_goes_through_its_own_adapter(held: Held, names: tuple[str | None, ...]) -> None:
    held.switch.use("b")
    with held.switch.rows(names):
        mixed = logits(held.base.model)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], held.alone[name][row], **CLOSE)  # float32 sums in another order
    assert torch.equal(logits(held.base.model), held.alone["b"])  # and afterwards all is as it was
    held.switch.use(None)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_mixes_rows(zoo: Zoo, family: str, tmp_path: Path) -> None:
    model = Held(zoo(family), tmp_path)
    with model.switch.rows(("b", None, "a", "b")):
        mixed = logits(model.base.model)
    for row, name in enumerate(("b", None, "a", "b")):
        torch.testing.assert_close(mixed[row], model.alone[name][row], rtol=1e-5, atol=1e-5)


def test_a_mix_is_the_weighted_sum_of_the_updates(held: Held) -> None:
    held.switch.mix({"a": 0.5, "b": -0.25, "c": 2.0})
    parts = {"a": 0.5, "b": -0.25, "c": 2.0}
    updates = {name: folded(peft_files.read(held.folders[name]), weight) for name, weight in parts.items()}
    layers = adapted(held.base.model)
    assert len(layers) == 14
    for path, layer in layers.items():
        expected = sum(pairs[path][1] @ pairs[path][0] for pairs in updates.values() if path in pairs)
        torch.testing.assert_close(layer.delta(), expected, **CLOSE)
    assert held.switch.name == "0.5 a + -0.25 b + 2 c"
    held.switch.mix({"b": 1.0})
    torch.testing.assert_close(logits(held.base.model), held.alone["b"], **CLOSE)
    held.switch.use(None)
    assert torch.equal(logits(held.base.model), held.alone[None])


def test_a_thousand_swaps_are_quick_and_leave_nothing_behind(held: Held) -> None:
    def tensors() -> int:
        gc.collect()
        return sum(isinstance(each, Tensor) for each in gc.get_objects())

    def turn() -> None:
        held.switch.use("a")
        held.switch.mix({"a": 1.0, "b": 0.5})
        with held.switch.rows(("a", None, "b", "c")):
            pass
        held.switch.use(None)

    turn()
    before, resident = tensors(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    for _ in range(250):
        turn()
    assert time.perf_counter() - started < 10  # a switch takes well under a millisecond here; ten leave room
    assert tensors() == before
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident < 16 * 1024  # KiB
    assert torch.equal(logits(held.base.model), held.alone[None])


def test_what_cannot_be_meant_is_refused(held: Held, zoo: Zoo) -> None:
    for wrong in (lambda: held.switch.use("aa"), lambda: held.switch.mix({"d": 1.0})):
        with pytest.raises(AdapterError, match="Known: a, b, c"):
            wrong()
    with pytest.raises(AdapterError, match="held already"):
        held.switch.hold("a", {})
    with held.switch.rows(("a", "b")), pytest.raises(AdapterError, match="4 rows"):
        logits(held.base.model)
    other = base_of(zoo("llama-tied-bias", seed=1))
    with pytest.raises(AdapterError, match="other weights"):
        peft_files.fitted(other.model, peft_files.read(held.folders["a"]), other.manifest.sha256)


def test_generate_answers_with_each_adapter_as_it_would_alone(held: Held, zoo: Zoo, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("one two", "a", "longer than these")))
    words = [word for name in "abc" for word in ("--adapter", f"{name}={held.folders[name]}")]
    model = zoo("llama-tied-bias")
    said = qlora("generate", model, prompts, *words, "--max-new-tokens", 6, "--json").json["rows"]
    assert [row["adapter"] for row in said] == ["a", "b", "c"] * 3
    for name in "abc":
        one = ("--adapter", f"{name}={held.folders[name]}", "--max-new-tokens", 6, "--json")
        alone = qlora("generate", model, prompts, *one).json["rows"]
        assert [row["output_ids"] for row in alone] == [row["output_ids"] for row in said if row["adapter"] == name]
    plain = qlora("generate", model, "one two", *words[:4], "--max-new-tokens", 6)
    assert [line.split(":")[0] for line in plain.out.splitlines() if line[:2] in ("a:", "b:")] == ["a", "b"]
    for bad in ("base=x", "no/name=x", f"a={held.folders['b']}"):
        refused = qlora("generate", model, "one", "--adapter", f"a={held.folders['a']}", "--adapter", bad)
        assert refused.code == 2 and refused.err.count("error: ") == 1


def test_a_run_is_opened_with_others_beside_it(held: Held, zoo: Zoo, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 8)
    run(recipe_of(zoo("llama-tied-bias"), data, tmp_path / "run", "train.max_steps=1"))
    folders: dict[str, Any] = {"own": str(tmp_path / "run"), "a": str(held.folders["a"])}
    opened, switch = load_with_adapters(str(tmp_path / "run"), folders)
    assert switch.names == ["own", "a"] and switch.name == "own" and opened.adapter is not None
    switch.use("a")
    torch.testing.assert_close(logits(opened.base.model), held.alone["a"], **CLOSE)
