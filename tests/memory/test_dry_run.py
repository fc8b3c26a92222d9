"""The plan against a dry run of the very layers at true shapes: what stands, what a layer keeps, and the peak."""

from typing import Any

import pytest
import torch
from support.dry_run import Measured, dry_run
from support.published_models import CONFIGS
from transformers import AutoConfig

from qlora.memory.planner.activations import kept_bytes
from qlora.memory.planner.breakdown import OUTSIDE, phases_of
from qlora.memory.planner.config_reader import shapes_of
from qlora.memory.planner.workload import AdapterSizes, Workload

FROZEN = ("packed_base", "embeddings", "head", "norms", "vision", "adapters")
BF16, F32 = torch.bfloat16, torch.float32
OTHERS: dict[str, dict[str, Any]] = {
    "Pythia-6.9B": {"model_type": "gpt_neox", "hidden_size": 4096, "num_attention_heads": 32,
                    "intermediate_size": 16384},
    "Phi-3-mini": {"model_type": "phi3"},
    "Qwen2-1.5B": {"model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12,
                   "num_key_value_heads": 2, "tie_word_embeddings": True},
    "Gemma-7B": {"model_type": "gemma"},
    "Granite-8B": {"model_type": "granite", "logits_scaling": 8.0, "vocab_size": 49152},
    "Gemma-2-9B": {"model_type": "gemma2", "hidden_size": 3584, "intermediate_size": 14336, "num_attention_heads": 16,
                   "num_key_value_heads": 8},
    "Gemma-3-4B": {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240},
}  # fmt: skip


def both(written: dict[str, Any], dtype: torch.dtype, **options: Any) -> tuple[Workload, Measured]:
    """A model of two layers: planned, and run dry."""
    written = {**written, "num_hidden_layers": 2}
    if written["model_type"] == "gemma3_text":
        written["layer_types"] = ["full_attention"] * 2  # at most one kind, so that the dry run knows which mask
    rows, length = options.get("rows", 1), options.get("length", 1024)
    documents, recompute = options.get("documents", 1), options.get("recompute", 2)
    config = AutoConfig.for_model(**written)
    measured = dry_run(config, dtype, rows, length, documents=documents, recompute=recompute)
    shapes = shapes_of(written, "model")
    sizes = {"micro_batch": rows, "max_length": length, "packing": documents > 1, "recompute": recompute}
    work = Workload(shapes, AdapterSizes(shapes.matrices), dtype_bytes=dtype.itemsize, device="cpu", **sizes)
    return work, measured


def planned_step(work: Workload) -> int:
    """The peak of forward and backward as the dry run counts it: no gradients, moments, or what is outside tensors."""
    left_out = ("gradients", "optimizer", *OUTSIDE)
    phases = phases_of(work)
    return max(
        sum(phases[phase].values()) - sum(phases[phase][each] for each in left_out) for phase in ("loss", "backward")
    )


def assert_close(work: Workload, measured: Measured) -> None:
    frozen = phases_of(work)["backward"]
    assert sum(frozen[each] for each in FROZEN) == pytest.approx(measured.static, rel=1e-4)  # the offsets of absmax
    assert kept_bytes(work) == pytest.approx(measured.kept, rel=0.001)  # statistics of norms
    assert planned_step(work) == pytest.approx(measured.static + max(measured.loss, measured.backward), rel=0.03)


@pytest.mark.parametrize(
    "options", [{"length": 2048}, {"recompute": 0}, {"recompute": 1, "rows": 2, "documents": 4}], ids=str
)
@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Llama-3.1-70B", "Qwen3-32B"])
def test_the_plan_is_the_dry_run(name: str, options: dict[str, Any]) -> None:
    assert_close(*both(CONFIGS[name], BF16, **options))


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("name", OTHERS)
def test_the_plan_is_the_dry_run_in_every_family(name: str, dtype: torch.dtype) -> None:
    assert_close(*both(OTHERS[name], dtype, length=512))


def test_the_plan_is_the_dry_run_in_float32() -> None:
    assert_close(*both(CONFIGS["Llama-2-7B"], F32, documents=2))
