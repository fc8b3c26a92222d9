"""Adapter folders in PEFT's format: stable bytes, exact target names, and refusal of damaged or foreign files."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.adapted_models import identity_of, inject_trained, load_base, load_plain, logits
from torch import Tensor

from qlora.adapters import peft_files
from qlora.adapters.attach import attach
from qlora.adapters.inject import adapted
from qlora.adapters.peft_config import module_settings
from qlora.errors import AdapterError, QloraError

Zoo = Callable[..., Path]


def test_the_same_adapter_is_the_same_bytes() -> None:
    named = {"a": torch.ones(2), "b": torch.zeros(3)}
    assert len({peft_files.serialize(named, {peft_files.FINGERPRINT: "0" * 64}) for _ in range(30)}) == 1


def test_target_modules_name_exactly_the_adapted_layers(zoo: Zoo, tmp_path: Path) -> None:
    for number, targets in enumerate(["all-linear", ["q_proj", "down_proj"], r".*\.0\.mlp\..*"]):
        base = load_base(zoo("llama"), "dense")
        peft_files.write(tmp_path / str(number), base.model, inject_trained(base, "lora", targets), identity_of(base))
        names = json.loads((tmp_path / str(number) / peft_files.CONFIG).read_text())["target_modules"]
        paths = [path for path, _ in load_plain(zoo("llama")).named_modules()]
        matched = {path for path in paths if any(path == name or path.endswith(f".{name}") for name in names)}
        assert matched == set(adapted(base.model))


def test_an_adapter_of_another_base_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    base, other = load_base(zoo("llama"), "nf4"), load_base(zoo("llama", seed=1), "nf4")
    peft_files.write(tmp_path, base.model, inject_trained(base, "lora"), identity_of(base))
    before = logits(other.model)
    with pytest.raises(AdapterError, match="other weights"):
        attach(other.model, peft_files.read(tmp_path), other.manifest.sha256)
    assert not adapted(other.model) and torch.equal(logits(other.model), before)
    attach(other.model, peft_files.read(tmp_path), other.manifest.sha256, allow_other_base=True)
    assert adapted(other.model)


def test_an_adapter_that_does_not_fit_is_refused_before_any_change(zoo: Zoo, tmp_path: Path) -> None:
    base = load_base(zoo("llama"), "dense")
    peft_files.write(tmp_path, base.model, inject_trained(base, "lora"), identity_of(base))
    for family in ("gpt_neox", "phi3"):
        other = load_base(zoo(family), "dense")
        with pytest.raises(AdapterError, match="does not fit"):
            attach(other.model, peft_files.read(tmp_path), base.manifest.sha256)
        assert not adapted(other.model)


def test_nothing_is_written_when_a_value_is_not_finite(zoo: Zoo, tmp_path: Path) -> None:
    base = load_base(zoo("llama"), "dense")
    adapter = inject_trained(base, "lora")
    with torch.no_grad():
        list(adapted(base.model).values())[-1].B[0, 0] = math.nan
    with pytest.raises(QloraError, match="not finite") as caught:
        peft_files.write(tmp_path / "run", base.model, adapter, identity_of(base))
    assert caught.value.exit_code == 1
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def _with_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / peft_files.WEIGHTS)
        change(tensors)
        save_file(tensors, folder / peft_files.WEIGHTS, metadata={"format": "pt"})

    return apply


def _with_config(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / peft_files.CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


Q = "base_model.model.model.layers.0.self_attn.q_proj"
DAMAGES: dict[str, Callable[[Path], Any]] = {
    "no weights": lambda folder: (folder / peft_files.WEIGHTS).unlink(),
    "no config": lambda folder: (folder / peft_files.CONFIG).unlink(),
    "truncated weights": lambda folder: (folder / peft_files.WEIGHTS).write_bytes(
        (folder / peft_files.WEIGHTS).read_bytes()[:-9]
    ),
    "truncated config": lambda folder: (folder / peft_files.CONFIG).write_text('{"peft_type": "LO'),
    "config is a list": lambda folder: (folder / peft_files.CONFIG).write_text("[]"),
    "another method": _with_config(peft_type="IA3"),
    "alpha is zero": _with_config(lora_alpha=0),
    "alpha is a text": _with_config(lora_alpha="16"),
    "alpha is infinite": _with_config(lora_alpha=math.inf),
    "dropout is a text": _with_config(lora_dropout="much"),
    "alpha pattern is a list": _with_config(alpha_pattern=["q_proj"]),
    "alpha pattern of texts": _with_config(alpha_pattern={"q_proj": "8"}),
    "DoRA without magnitudes": _with_config(use_dora=True),
    "a module to save is missing": _with_config(modules_to_save=["lm_head"]),
    "modules to save is a text": _with_config(modules_to_save="lm_head"),
    "token rows are missing": _with_config(trainable_token_indices=[3]),
    "ranks of texts": _with_config(rank_pattern={"q_proj": "8"}),
    "replicated layers": _with_config(layer_replication=[[0, 2], [0, 2]]),
    "activation by tokens": _with_config(alora_invocation_tokens=[5, 6]),
    "A without B": _with_tensors(lambda t: t.pop(f"{Q}.lora_B.weight")),
    "an unknown tensor": _with_tensors(lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(3, 3)})),
    "a tensor of another shape": _with_tensors(lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(4, 63)})),
    "A of another rank than B": _with_tensors(lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(5, 64)})),
    "A of rank 0": _with_tensors(
        lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(0, 64), f"{Q}.lora_B.weight": torch.zeros(64, 0)})
    ),
    "NaN values": _with_tensors(lambda t: t.update({f"{Q}.lora_A.weight": torch.full((4, 64), math.nan)})),
    "integer values": _with_tensors(lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 64, dtype=torch.int8)})),
    "a pair is missing": _with_tensors(lambda t: (t.pop(f"{Q}.lora_A.weight"), t.pop(f"{Q}.lora_B.weight"))),
}


@pytest.fixture(scope="module")
def valid(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A valid adapter's folder, and that of its base."""
    folder = tmp_path_factory.mktemp("adapter")
    base = load_base(zoo("llama"), "dense")
    peft_files.write(folder, base.model, inject_trained(base, "lora"), identity_of(base))
    return {"folder": folder, "model": zoo("llama")}


def copy_folder(folder: Path, target: Path) -> Path:
    target.mkdir(exist_ok=True)
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.mark.sample(of=2)
@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_adapter_is_refused_and_the_model_unchanged(
    valid: dict[str, Path], case: str, tmp_path: Path
) -> None:
    folder = copy_folder(valid["folder"], tmp_path / "adapter")
    DAMAGES[case](folder)
    base = load_base(valid["model"], "dense")
    with pytest.raises(AdapterError) as caught:
        attach(base.model, peft_files.read(folder), base.manifest.sha256)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert not adapted(base.model)


@settings(max_examples=50, deadline=None)
@given(
    key=st.sampled_from(
        ["peft_type", "r", "lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora", "target_modules"]
    ),
    value=st.recursive(
        st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    ),
)
def test_any_config_is_read_or_refused_but_never_crashes(valid: dict[str, Path], key: str, value: Any) -> None:
    folder = valid["folder"].parent / "fuzzed"
    copy_folder(valid["folder"], folder)
    _with_config(**{key: value})(folder)
    try:
        file = peft_files.read(folder)
        for path, (a, _) in file.pairs.items():
            assert math.isfinite(module_settings(file.config, path, a.shape[0]).scaling)
    except AdapterError as error:
        assert str(folder) in str(error)
