"""The plan against a dry run of the layers at true shapes: static bytes, bytes saved by a layer, and the peak."""

from typing import Any

import pytest
import torch
from support.dry_run import Measured, dry_run
from support.published_models import CONFIGS, workload
from transformers import AutoConfig

from qlora.memory.planner.activations import kept_bytes
from qlora.memory.planner.breakdown import phases_of
from qlora.memory.planner.config_reader import shapes_of
from qlora.memory.planner.overhead import UNTRACKED
from qlora.memory.planner.workload import Workload

FROZEN = ("packed_base", "embeddings", "head", "norms", "adapters")
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


def workload_and_dry_run(config: dict[str, Any], dtype: torch.dtype, **options: Any) -> tuple[Workload, Measured]:
    """A model of two layers: its workload for the planner, and the result of its dry run."""
    config = {**config, "num_hidden_layers": 2}
    if config["model_type"] == "gemma3_text":
        config["layer_types"] = ["full_attention"] * 2  # the dry run has a single mask
    sequences, length = options.get("sequences", 1), options.get("length", 256)
    documents, recompute = options.get("documents", 1), options.get("recompute", 2)
    transformers_config = AutoConfig.for_model(**config)
    gpu = options.get("gpu", False)
    measured = dry_run(transformers_config, dtype, sequences, length, documents=documents, recompute=recompute, gpu=gpu)
    sizes = {"micro_batch": sequences, "max_length": length, "packing": documents > 1, "recompute": recompute}
    device = "cuda" if gpu else "cpu"
    work = workload(shapes_of(config, "model"), dtype_bytes=dtype.itemsize, device=device, **sizes)
    return work, measured


def planned_step(work: Workload) -> int:
    """The peak of forward and backward as the dry run counts it: tensors without gradients and moments."""
    excluded = ("gradients", "optimizer", *UNTRACKED)
    phases = phases_of(work)
    return max(
        sum(phases[phase].values()) - sum(phases[phase][name] for name in excluded) for phase in ("loss", "backward")
    )


def assert_close(work: Workload, measured: Measured) -> None:
    frozen = phases_of(work)["backward"]
    assert sum(frozen[name] for name in FROZEN) == pytest.approx(
        measured.static, rel=1e-4
    )  # the bytes of the absmax offsets
    kept = kept_bytes(work, work.shapes.kinds[-1])
    assert kept == pytest.approx(measured.kept, rel=0.001)  # the statistics of the norms
    assert planned_step(work) == pytest.approx(measured.static + max(measured.loss, measured.backward), rel=0.03)


@pytest.mark.sample(of=12, every=("name",))
@pytest.mark.parametrize(
    "options", [{"length": 640}, {"recompute": 0}, {"recompute": 1, "sequences": 2, "documents": 4}], ids=str
)
@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Llama-3.1-70B"])
def test_the_plan_equals_the_dry_run(name: str, options: dict[str, Any]) -> None:
    assert_close(*workload_and_dry_run(CONFIGS[name], BF16, **options))


@pytest.mark.sample(of=12)
@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, BF16) for name in OTHERS), ("Gemma-7B", F32), ("Gemma-3-4B", F32)], ids=str
)
def test_the_plan_equals_the_dry_run_in_every_family(name: str, dtype: torch.dtype) -> None:
    assert_close(*workload_and_dry_run(OTHERS[name], dtype, length=128))


def test_the_plan_equals_the_dry_run_in_float32() -> None:
    assert_close(*workload_and_dry_run(CONFIGS["Llama-2-7B"], F32, documents=2))


# 32,768 tokens are many chunks: the two largest models are slow.
QUICK, LARGE = ("Llama-2-7B", "Llama-3.1-8B", "Qwen2-1.5B"), ("Qwen3-32B", "Llama-3.1-70B")
GPU = [(name, *sizes) for name in QUICK + LARGE for sizes in ((2048, 2), (8192, 0), (8192, 2), (32768, 2))]


@pytest.mark.sample(of=12)
@pytest.mark.parametrize(
    ("name", "length", "recompute"),
    [pytest.param(*case, marks=[pytest.mark.slow] if case[0] in LARGE and case[1] > 8192 else []) for case in GPU],
)
def test_the_plan_of_a_gpu_equals_the_dry_run(name: str, length: int, recompute: int) -> None:
    """The kernels and chunks of a GPU: the whole peak within 3 %, and what is not frozen alone within 5 %."""
    config = (CONFIGS | OTHERS)[name]
    work, measured = workload_and_dry_run(config, BF16, length=length, recompute=recompute, gpu=True)
    peak = max(measured.loss, measured.backward)
    assert planned_step(work) == pytest.approx(measured.static + peak, rel=0.03)
    assert planned_step(work) - measured.static == pytest.approx(peak, rel=0.05)
    assert kept_bytes(work, work.shapes.kinds[-1]) == pytest.approx(measured.kept, rel=0.001)


NEWER: dict[str, dict[str, Any]] = {
    "SmolLM3-3B": {"model_type": "smollm3"}, "Ministral-3-8B": {"model_type": "ministral3"},
    "OLMo-2-7B": {"model_type": "olmo2"}, "EXAONE-4": {"model_type": "exaone4", "layer_types": ["full_attention"] * 2},
    "CWM-32B": {"model_type": "cwm", "layer_types": ["full_attention"] * 2},
}  # fmt: skip


@pytest.mark.sample(of=12)
@pytest.mark.parametrize("name", NEWER)
def test_the_plan_of_newer_families_equals_the_dry_run_of_a_gpu(name: str) -> None:
    work, measured = workload_and_dry_run(NEWER[name], BF16, length=2048, gpu=True)
    assert kept_bytes(work, work.shapes.kinds[-1]) == pytest.approx(measured.kept, rel=0.001)
    assert planned_step(work) == pytest.approx(measured.static + max(measured.loss, measured.backward), rel=0.015)
