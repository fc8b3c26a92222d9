"""Adapters of other tools: names of tensors, changed starts, settings in use: read, reported, or refused by name."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.adapted_models import load_base, load_plain, logits
from support.peft_adapters import change_config, change_tensors, read_dense, save_peft_adapter
from torch import Tensor

from qlora.adapters import peft_fields, peft_files
from qlora.adapters.attach import attach
from qlora.adapters.changed_base import leading_directions
from qlora.adapters.peft_starts import changed_start
from qlora.errors import AdapterError

Zoo = Callable[..., Path]
PREFIX = "base_model.model."
UP = f"{PREFIX}model.layers.0.mlp.up_proj"
PATTERNS: dict[str, Any] = {
    "rank_pattern": {"down_proj": 6}, "alpha_pattern": {"layers.0.self_attn.q_proj": 20}, "use_rslora": True
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of PEFT with patterns. Never write into it."""
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    save_peft_adapter(zoo("llama"), folder, **PATTERNS)
    return folder


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture(scope="module")
def expected(zoo: Zoo, folder: Path) -> Tensor:
    return logits(peft.PeftModel.from_pretrained(load_plain(zoo("llama")), folder).eval())


def renamed(change: Callable[[str], str]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {change(key): value for key, value in tensors.items()}


OTHER_NAMES: dict[str, Callable[[str], str]] = {
    "torch.compile": lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "compiled whole": lambda key: f"_orig_mod.{key}",
    "compiled layers": lambda key: key.replace("layers.0.", "layers.0._orig_mod."),
    "DDP": lambda key: f"module.{key}",
    "FSDP": lambda key: f"_fsdp_wrapped_module.{key}".replace("layers.1.", "layers.1._fsdp_wrapped_module."),
    "adapter name": lambda key: key.replace(".weight", ".default.weight"),
    "no prefix": lambda key: key.removeprefix(PREFIX),
    "half the prefix": lambda key: key.replace(PREFIX, "base_model."),
    "inner language model": lambda key: key.replace(f"{PREFIX}model.", f"{PREFIX}model.language_model."),
    "outer language model": lambda key: key.replace(PREFIX, f"{PREFIX}language_model."),
    "several": lambda key: f"module._orig_mod.{key.replace(PREFIX, PREFIX + 'language_model.')}",
}


@pytest.mark.parametrize("case", OTHER_NAMES)
def test_names_that_wrappers_changed_are_read_with_a_line(zoo: Zoo, copy: Path, expected: Tensor, case: str) -> None:
    lines: list[str] = []
    base = read_dense(zoo("llama"), change_tensors(copy, renamed(OTHER_NAMES[case])), lines.append)
    torch.testing.assert_close(logits(base.model), expected, rtol=0, atol=2e-5)
    assert len(lines) >= 1 and str(copy) in lines[0] and "have other names" in lines[0]


def twice(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**tensors, **{f"module.{key}": value.clone() for key, value in tensors.items()}}


def two_adapters(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {key: "a" if "layers.0" in key else "b" for key in tensors}
    return {key.replace(".weight", f".{names[key]}.weight"): value for key, value in tensors.items()}


REFUSED_TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "a tower": (renamed(lambda key: key.replace("model.layers", "vision_tower.layers")), "use the base it was trained"),
    "another class": (renamed(lambda key: key.replace("q_proj", "wq")), "wq is not a linear layer of this base"),
    "experts": (renamed(lambda key: key.replace("mlp.", "mlp.experts.0.")), "experts.0.down_proj is not a"),
    "two names of one": (twice, "name one tensor"),
    "two adapters": (two_adapters, r"2 adapters \(a, b\).*selected_adapters"),
    "no tensors": (lambda tensors: {}, "found no lora_A and lora_B"),
    "ZeRO-3": (lambda tensors: dict.fromkeys(tensors, torch.zeros(0)), "ZeRO-3.*zero_to_fp32"),
    "biases": (lambda tensors: {**tensors, f"{UP}.bias": torch.ones(96)}, "bias that was trained.*merge_and_unload"),
    "a weight of the base": (
        lambda tensors: {**tensors, f"{UP}.base_layer.weight": torch.ones(96, 64)}, "save_embedding_layers=False",
    ),
    "AdaLoRA": (lambda tensors: {**tensors, f"{UP}.lora_E": torch.ones(4, 1)}, "AdaLoRA"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_TENSORS)
def test_tensors_that_fit_nothing_are_refused_by_what_they_are(zoo: Zoo, copy: Path, case: str) -> None:
    change, message = REFUSED_TENSORS[case]
    change_tensors(copy, lambda tensors: {key: value.clone() for key, value in change(tensors).items()})
    with pytest.raises(AdapterError, match=f"(?is){copy}.*{message}"):
        read_dense(zoo("llama"), copy)


def test_a_rank_that_no_setting_names_is_refused(zoo: Zoo, copy: Path) -> None:
    with pytest.raises(AdapterError, match=r"q_proj has rank 4, its config says 16"):
        read_dense(zoo("llama"), change_config(copy, r=16))


STARTS: dict[Any, str | None] = {
    True: None, False: None, None: None, "gaussian": None, "orthogonal": None, "eva": None, "mica": None,
    "pissa": "pissa", "PiSSA": "pissa", "olora": "olora", "OLoRA": "olora",
}  # fmt: skip
REFUSED_STARTS = {
    "corda": "path_initial_model_for_weight_conversion", "lora_ga": "path_initial_model_for_weight_conversion",
    "pissa_niter_16": "at random.*path_initial_model_for_weight_conversion", "loftq": "merge_and_unload",
    "milora": "not known.*write true there", 3: "not known",
}  # fmt: skip


@pytest.mark.parametrize("start", STARTS)
def test_starts_that_changed_the_base_are_known(start: Any) -> None:
    assert changed_start(Path("adapter_config.json"), {"init_lora_weights": start}) == STARTS[start]


@pytest.mark.parametrize("start", REFUSED_STARTS)
def test_starts_that_cannot_be_computed_again_are_refused_with_the_remedy(copy: Path, start: Any) -> None:
    change_config(copy, init_lora_weights=start)
    with pytest.raises(AdapterError, match=f"init_lora_weights: found {str(start)!r}.*{REFUSED_STARTS[start]}"):
        peft_files.read(copy)


def test_no_start_of_peft_is_missing_here() -> None:
    hints = str(peft.LoraConfig.__dataclass_fields__["init_lora_weights"].type)
    names = [name for name in hints.replace('"', "'").split("'") if name.isidentifier() and len(name) > 3]
    assert len(names) >= 6
    for name in names:
        try:
            changed_start(Path("x"), {"init_lora_weights": name})
        except AdapterError as error:
            assert "not known" not in str(error), name


def test_without_its_base_an_adapter_with_a_changed_start_is_not_attached(zoo: Zoo, copy: Path) -> None:
    base = load_base(zoo("llama"), "dense")
    with pytest.raises(AdapterError, match=r"start \(pissa\) changed the base.*qlora export"):
        attach(base.model, peft_files.read(change_config(copy, init_lora_weights="pissa")), base.manifest.sha256)


@pytest.mark.parametrize(("shape", "rank"), [((300, 400), 5), ((400, 200), 3), ((64, 96), 20), ((20, 8), 8)])
def test_leading_directions_are_those_of_the_svd(shape: tuple[int, int], rank: int) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    matrix = left * (values * torch.linspace(1, 0.1, len(values))) @ right
    directions = leading_directions(matrix, rank)
    expected = right[:rank].t() @ right[:rank]
    torch.testing.assert_close(directions @ directions.t(), expected, rtol=0, atol=1e-7)


OTHER_VALUES: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 3, "init_lora_weights": "gaussian"}


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(peft.LoraConfig)])
def test_every_field_of_peft_is_applied_without_effect_or_refused(name: str) -> None:
    tables = [peft_fields.APPLIED, peft_fields.WITHOUT_EFFECT, peft_fields.REFUSED.keys()]
    assert sum(name in table for table in tables) == 1
    if name in peft_fields.REFUSED:
        with pytest.raises(AdapterError, match=rf"{name} is not supported: .*merge_and_unload"):
            peft_fields.refuse_fields(Path("x"), {name: OTHER_VALUES.get(name, True)})
    assert not list(peft_fields.report_unknown_fields(Path("x"), {name: OTHER_VALUES.get(name, True)}))


def test_default_values_of_peft_are_never_in_use() -> None:
    defaults = peft.LoraConfig().to_dict()
    peft_fields.refuse_fields(Path("x"), defaults)
    assert not list(peft_fields.report_unknown_fields(Path("x"), defaults | {"future": None, "new": False, "list": []}))


def test_unknown_settings_in_use_are_reported_by_every_reader(zoo: Zoo, copy: Path) -> None:
    change_config(copy, use_hyper_lora=True, hyper_rank=4, future=None)
    (note,) = peft_files.read(copy).notes
    assert f"{copy}/adapter_config.json" in note and "hyper_rank (4), use_hyper_lora (true)" in note
    assert "future" not in note
    lines: list[str] = []
    read_dense(zoo("llama"), copy, lines.append)
    assert note in lines


def test_an_order_of_patterns_that_peft_has_sorted_is_reported(zoo: Zoo, tmp_path: Path) -> None:
    save_peft_adapter(zoo("llama"), tmp_path, alpha_pattern={"q_proj": 2, r".*\.1\..*": 9, "down_proj": 9})
    (note,) = peft_files.read(tmp_path).notes
    assert "alpha_pattern" in note and "layers.1.self_attn.q_proj; the first counts" in note
