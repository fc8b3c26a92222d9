"""Several adapters on one base: each computes exactly what it does alone, and switching leaves no trace."""

import gc
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapted_models import build_adapter, identity_of, load_base
from support.adapted_models import logits as logits_of
from support.command_line import qlora
from support.small_runs import recipe_of, run, write_records
from support.tiny_models import FAMILIES
from torch import Tensor

from qlora.adapters import peft_files
from qlora.adapters.attach import attach, build_layers
from qlora.adapters.inject import adapted, inject
from qlora.adapters.plain_lora import fold_scaling
from qlora.adapters.switch import AdapterSwitch
from qlora.errors import AdapterError
from qlora.runs.load_run import load_with_adapters

Zoo = Callable[..., Path]
IDS = torch.randint(5, 250, (4, 24), generator=torch.Generator().manual_seed(0))
ADAPTERS = {"a": ("lora", 4, "all-linear"), "b": ("rslora", 8, "all-linear"), "c": ("lora", 2, ["q_proj", "down_proj"])}
CLOSE = {"rtol": 0, "atol": 1e-5}


def write_adapter(base_folder: Path, folder: Path, name: str) -> Path:
    """A random adapter with a large update for a base, as a folder."""
    base = load_base(base_folder)
    kind, rank, targets = ADAPTERS[name]
    leaves = {path.rpartition(".")[2] for path, _ in base.model.named_modules()}
    targets = targets if targets == "all-linear" or set(targets) <= leaves else "all-linear"
    adapter = build_adapter(kind, rank, 8.0)
    inject(base.model, adapter, targets, seed=ord(name))
    generator = torch.Generator().manual_seed(ord(name))
    with torch.no_grad():
        for layer in adapted(base.model).values():
            layer.B.copy_(torch.randn(layer.B.shape, generator=generator) * 0.1)
    peft_files.write(folder, base.model, adapter, identity_of(base))
    return folder


def logits(model: Any) -> Tensor:
    return logits_of(model, IDS)


class SwitchedBase:
    """A base, a switch with adapters a, b and c, and the logits of each attached alone."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.folders = {name: write_adapter(model, folder / name, name) for name in ADAPTERS}
        self.base = load_base(model)
        self.switch = AdapterSwitch(self.base.model)
        self.alone: dict[str | None, Tensor] = {None: logits(self.base.model)}
        for name, adapter_folder in self.folders.items():
            file = peft_files.read(adapter_folder)
            self.switch.add(name, build_layers(self.base.model, file, self.base.manifest.sha256)[0])
            fresh = load_base(model)
            attach(fresh.model, file, fresh.manifest.sha256)
            self.alone[name] = logits(fresh.model)


@pytest.fixture(scope="module")
def switched(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> SwitchedBase:
    return SwitchedBase(zoo("llama-tied-bias"), tmp_path_factory.mktemp("switched"))


def test_the_active_adapter_computes_what_it_does_alone(switched: SwitchedBase) -> None:
    assert switched.switch.names == ["a", "b", "c"]
    for name in ("a", "b", None, "c", "a", None):
        switched.switch.activate(name)
        assert switched.switch.active == name and torch.equal(logits(switched.base.model), switched.alone[name])
    alone = switched.alone
    assert not torch.allclose(alone["a"], alone["b"]) and not torch.allclose(alone["c"], alone[None])
    assert not adapted(switched.base.model)  # with None no adapter layer is in the model


@pytest.mark.parametrize("names", [("a", "b", "c", None), ("b", "b", "a", "b"), (None,) * 4, ("c", None, "a", "c")])
def test_each_row_of_a_batch_uses_its_own_adapter(switched: SwitchedBase, names: tuple[str | None, ...]) -> None:
    switched.switch.activate("b")
    with switched.switch.per_row(names):
        mixed = logits(switched.base.model)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], switched.alone[name][row], **CLOSE)  # float32 sums in another order
    assert torch.equal(logits(switched.base.model), switched.alone["b"])  # as before the block
    switched.switch.activate(None)


@pytest.mark.sample(of=6)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_supports_an_adapter_per_row(zoo: Zoo, family: str, tmp_path: Path) -> None:
    switched = SwitchedBase(zoo(family), tmp_path)
    with switched.switch.per_row(("b", None, "a", "b")):
        mixed = logits(switched.base.model)
    for row, name in enumerate(("b", None, "a", "b")):
        torch.testing.assert_close(mixed[row], switched.alone[name][row], rtol=1e-5, atol=1e-5)


def test_a_mix_is_the_weighted_sum_of_the_updates(switched: SwitchedBase) -> None:
    weights = {"a": 0.5, "b": -0.25, "c": 2.0}
    switched.switch.mix(weights)
    updates = [fold_scaling(peft_files.read(switched.folders[name]), weight) for name, weight in weights.items()]
    layers = adapted(switched.base.model)
    assert len(layers) == 14
    for path, layer in layers.items():
        expected = sum(pairs[path][1] @ pairs[path][0] for pairs in updates if path in pairs)
        torch.testing.assert_close(layer.delta(), expected, **CLOSE)
    assert switched.switch.active == "0.5 a + -0.25 b + 2 c"
    switched.switch.mix({"b": 1.0})
    torch.testing.assert_close(logits(switched.base.model), switched.alone["b"], **CLOSE)
    switched.switch.activate(None)
    assert torch.equal(logits(switched.base.model), switched.alone[None])


def test_hundreds_of_switches_are_fast_and_leak_nothing(switched: SwitchedBase) -> None:
    def count_tensors() -> int:
        gc.collect()
        return sum(isinstance(value, Tensor) for value in gc.get_objects())

    def switch_four_times() -> None:
        switched.switch.activate("a")
        switched.switch.mix({"a": 1.0, "b": 0.5})
        with switched.switch.per_row(("a", None, "b", "c")):
            pass
        switched.switch.activate(None)

    switch_four_times()
    before, resident = count_tensors(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    for _ in range(60):
        switch_four_times()
    assert time.process_time() - started < 2.4  # a switch takes well under a millisecond; the limit allows ten
    assert count_tensors() == before
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident < 16 * 1024  # KiB
    assert torch.equal(logits(switched.base.model), switched.alone[None])


def test_unknown_duplicate_and_foreign_adapters_are_refused(switched: SwitchedBase, zoo: Zoo) -> None:
    for activate in (lambda: switched.switch.activate("aa"), lambda: switched.switch.mix({"d": 1.0})):
        with pytest.raises(AdapterError, match="Known: a, b, c"):
            activate()
    with pytest.raises(AdapterError, match="loaded already"):
        switched.switch.add("a", {})
    with switched.switch.per_row(("a", "b")), pytest.raises(AdapterError, match="4 sequences"):
        logits(switched.base.model)
    other = load_base(zoo("llama-tied-bias", seed=1))
    with pytest.raises(AdapterError, match="other weights"):
        build_layers(other.model, peft_files.read(switched.folders["a"]), other.manifest.sha256)


def test_generate_gives_each_adapters_own_answer(switched: SwitchedBase, zoo: Zoo, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("one two", "a", "longer than these")))
    options = [option for name in "abc" for option in ("--adapter", f"{name}={switched.folders[name]}")]
    model = zoo("llama-tied-bias")
    rows = qlora("generate", model, prompts, *options, "--max-new-tokens", 6, "--json").json["rows"]
    assert [row["adapter"] for row in rows] == ["a", "b", "c"] * 3
    for name in "abc":
        one = ("--adapter", f"{name}={switched.folders[name]}", "--max-new-tokens", 6, "--json")
        alone = qlora("generate", model, prompts, *one).json["rows"]
        assert [row["output_ids"] for row in alone] == [row["output_ids"] for row in rows if row["adapter"] == name]
    text = qlora("generate", model, "one two", *options[:4], "--max-new-tokens", 6).out
    assert [line.split(":")[0] for line in text.splitlines() if line[:2] in ("a:", "b:")] == ["a", "b"]
    for invalid in ("base=x", "no/name=x", f"a={switched.folders['b']}"):
        refused = qlora("generate", model, "one", "--adapter", f"a={switched.folders['a']}", "--adapter", invalid)
        assert refused.code == 2 and refused.err.count("error: ") == 1


def test_a_run_is_loaded_with_other_adapters(switched: SwitchedBase, zoo: Zoo, tmp_path: Path) -> None:
    data = write_records(tmp_path / "records.jsonl", 8)
    run(recipe_of(zoo("llama-tied-bias"), data, tmp_path / "run", "train.max_steps=1"))
    folders = {"own": str(tmp_path / "run"), "a": str(switched.folders["a"])}
    loaded, switch = load_with_adapters(str(tmp_path / "run"), folders)
    assert switch.names == ["own", "a"] and switch.active == "own" and loaded.adapter is not None
    switch.activate("a")
    torch.testing.assert_close(logits(loaded.base.model), switched.alone["a"], **CLOSE)
