"""Checks that a run makes: the base's fingerprint, a gradient for every trainable tensor, an unchanged base."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.child_processes import Child
from support.small_runs import adapter_tensors, recipe_of, run, write_records
from support.training_hooks import before_first_forward

from qlora.adapters.inject import adapted
from qlora.errors import BaseModelError, InputError, QloraError
from qlora.model import Model
from qlora.model.frozen_digest import frozen_sha256
from qlora.model.load_base import Base, load
from qlora.quant import Quant, build_quantizer
from qlora.quant.linear import FrozenLinear
from qlora.runs.train import train
from qlora.training import OPTIMIZERS
from qlora.training.checkpoint import MANIFEST, POSITION, read
from qlora.training.loss import TokenLoss
from qlora.utils.atomic_files import sha256_of

Zoo = Callable[..., Path]


def loaded(folder: Path) -> Base:
    return load(Model(name=str(folder), dtype="float32"), build_quantizer(Quant()), torch.device("cpu"))


def with_config(folder: Path, target: Path, **changes: Any) -> Path:
    """A copy of a base with another config.json."""
    copy = Path(shutil.copytree(folder, target))
    config = json.loads((copy / "config.json").read_text()) | changes
    (copy / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return copy


# ---- the fingerprint


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}}),
        ("llama", {"rms_norm_eps": 1e-5}),
        ("llama", {"hidden_act": "gelu"}),
        ("mistral", {"sliding_window": 16}),
        ("granite", {"logits_scaling": 8.0}),
        ("gemma2", {"final_logit_softcapping": 20.0}),
        ("gemma2", {"query_pre_attn_scalar": 32}),
    ],
)
def test_other_numeric_settings_are_another_base(
    zoo: Zoo, family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    other = with_config(zoo(family), tmp_path / "other", **changes)
    assert loaded(other).manifest.sha256 != loaded(zoo(family)).manifest.sha256


@pytest.mark.parametrize(
    "changes",
    [
        {"transformers_version": "4.44.0", "use_cache": False, "architectures": None},
        {"rope_parameters": ..., "rope_theta": 10_000, "rope_scaling": None},  # as older versions wrote it
        {"rope_parameters": {"rope_theta": 10_000, "rope_type": "default"}},
        {"max_position_embeddings": 512, "pad_token_id": None, "initializer_range": 0.5, "attention_dropout": 0.5},
    ],
)
def test_settings_without_effect_on_numbers_are_the_same_base(
    zoo: Zoo, changes: dict[str, Any], tmp_path: Path
) -> None:
    assert (
        loaded(with_config(zoo("llama"), tmp_path / "same", **changes)).manifest.sha256
        == loaded(zoo("llama")).manifest.sha256
    )


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "vocab_size"])
@pytest.mark.parametrize("value", [10**9, 2**63, 1e308, -(10**6)])
def test_impossible_sizes_are_refused_at_once(zoo: Zoo, key: str, value: float, tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=key):
        loaded(with_config(zoo("llama"), tmp_path / "giant", **{key: value}))


# ---- the frozen base


def test_every_byte_of_the_frozen_base_changes_the_digest(zoo: Zoo) -> None:
    model = loaded(zoo("llama")).model
    digest = frozen_sha256(model)
    for number, value in enumerate([*model.parameters(), *model.buffers()]):
        flat = value.detach().reshape(-1).view(torch.uint8)
        index = (0, flat.numel() // 2, flat.numel() - 1)[number % 3]
        flat[index] ^= 64
        assert frozen_sha256(model) != digest
        flat[index] ^= 64
    assert frozen_sha256(model) == digest


def test_a_base_that_changes_during_training_ends_the_run(zoo: Zoo, tmp_path: Path) -> None:
    def flip_bit(model: TokenLoss) -> None:
        layer = next(module for module in model.modules() if isinstance(module, FrozenLinear))
        next(layer.parameters(recurse=False)).view(-1).view(torch.uint8)[5] ^= 1

    output = tmp_path / "run"
    error = pytest.raises(QloraError, match="bytes of the frozen base model changed")
    with before_first_forward(flip_bit), error as caught:
        run(recipe_of(zoo("llama"), write_records(tmp_path / "rows.jsonl", 8), output))
    assert caught.value.exit_code == 1 and not (output / "adapter_model.safetensors").exists()


# ---- gradients


@pytest.mark.sample(of=6)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_tensor_without_a_gradient_is_named_in_the_error(zoo: Zoo, kind: str, tmp_path: Path) -> None:
    def remove_gradient(model: TokenLoss) -> None:
        adapted(model.model)["model.layers.1.mlp.up_proj"].A.register_hook(torch.zeros_like)

    data = write_records(tmp_path / "rows.jsonl", 8)
    options = (f"optim.kind={kind}", "train.max_steps=8")
    run(recipe_of(zoo("llama"), data, tmp_path / "good", *options))
    error = pytest.raises(QloraError, match=r"1 of 28 trainable tensors.*layers\.1\.mlp\.up_proj\.A")
    with before_first_forward(remove_gradient), error:
        run(recipe_of(zoo("llama"), data, tmp_path / "run", *options))


# ---- what may not change on resume


def test_with_dropout_the_micro_batch_may_not_change(zoo: Zoo, tmp_path: Path) -> None:
    """Dropout masks are drawn per micro-batch; without dropout its size changes rounding only."""
    data = write_records(tmp_path / "rows.jsonl", 8)
    for dropout, name in ((0.1, "with"), (0.0, "without")):
        options = ("train.save_every=2", f"adapter.dropout={dropout}", "optim.warmup=0", "optim.schedule=constant")
        run(recipe_of(zoo("llama"), data, tmp_path / name, *options, "train.max_steps=2", "train.micro_batch=2"))
        longer = recipe_of(zoo("llama"), data, tmp_path / name, *options, "train.max_steps=3", "train.micro_batch=4")
        if dropout:
            with pytest.raises(InputError, match=r"train\.micro_batch \(was 2, is 4\)"):
                run(longer)
        else:
            assert run(longer)["result"]["steps"] == 3


def test_another_chat_template_or_tokenizer_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    data, options = write_records(tmp_path / "rows.jsonl", 8), ("train.save_every=2", "optim.warmup=0")
    run(recipe_of(zoo("llama"), data, tmp_path / "run", *options, "train.max_steps=2"))
    other = Path(shutil.copytree(zoo("llama"), tmp_path / "model"))
    template = next(other.glob("chat_template*"))
    template.write_text(template.read_text().replace("<|im_start|>{{", "<|im_start|> {{"))
    with pytest.raises(InputError, match="tokenizer and template"):
        run(recipe_of(other, data, tmp_path / "run", *options, "train.max_steps=3"))


@pytest.fixture(scope="module")
def checkpoint(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    options = ("train.max_steps=1", "train.save_every=1")
    run(recipe_of(zoo("llama"), write_records(folder / "rows.jsonl", 4), folder / "run", *options))
    return folder / "run" / "checkpoint-000001"


def edited(checkpoint: Path, parent: Path, file: str, **changes: Any) -> Path:
    """A copy of a checkpoint with other values in a file, and its digest in the manifest."""
    folder = Path(shutil.copytree(checkpoint, parent / checkpoint.name))
    values = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps(values) + "\n")
    manifest = json.loads((folder / MANIFEST).read_text())
    if file != MANIFEST:
        manifest["files"][file] = sha256_of(folder / file)
    (folder / MANIFEST).write_text(json.dumps(manifest) + "\n")
    return folder


def test_a_checkpoint_with_a_new_manifest_is_read(checkpoint: Path, tmp_path: Path) -> None:
    assert read(edited(checkpoint, tmp_path, POSITION)).position == read(checkpoint).position


@pytest.mark.parametrize("number", [2, 0, "1", None, True, 1.5])
def test_a_checkpoint_of_another_format_is_refused(checkpoint: Path, number: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"format.*reads format 1"):
        read(edited(checkpoint, tmp_path, MANIFEST, format=number))


@pytest.mark.parametrize(
    "changes",
    [
        {"step": -1},
        {"step": "1"},
        {"step": True},
        {"loss": float("nan")},
        {"best_step": 1.5},
        {"more": 1},
        {"fixed": 3},
    ],
)
def test_an_invalid_position_is_refused(checkpoint: Path, changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="position"):
        read(edited(checkpoint, tmp_path, POSITION, **changes))


# ---- reproducibility

QUICK = ("adamw", "paged_adamw_8bit")  # tests/fault_injection compares processes with every optimizer
KINDS = [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in OPTIMIZERS]


@pytest.mark.sample(of=4)
@pytest.mark.parametrize("kind", KINDS)
def test_a_recipe_gives_the_same_adapter_in_every_process(zoo: Zoo, kind: str, tmp_path: Path) -> None:
    data, digests = write_records(tmp_path / "rows.jsonl", 12), set()
    options = (f"optim.kind={kind}", "adapter.dropout=0.1", "data.packing=true", "train.deterministic=true",
               "train.max_steps=3")  # fmt: skip
    for name in ("one", "two"):
        recipe = recipe_of(zoo("llama"), data, tmp_path / name, *options)

        def work(notify: Any, recipe: Any = recipe) -> None:
            torch.manual_seed(hash(recipe.train.output))  # random state from before the run has no effect
            train(recipe, quiet=True)

        child = Child(work, tmp_path / "log")
        assert child.wait() == 0, (tmp_path / "log").read_text()
        digests.add(sha256_of(tmp_path / name / "adapter_model.safetensors"))
    assert len(digests) == 1 and adapter_tensors(tmp_path / "one")
