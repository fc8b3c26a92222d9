"""Every kind of recipe trains on the pretended GPU: no operator mixes devices, no copy races, no copy is pageable."""

import math

import pytest
from support.gpu_runs import GpuRuns
from support.small_runs import metrics

TOGETHER: dict[str, tuple[str, ...]] = {  # what does not touch each other, in one run
    "bfloat16": ("plain", "bfloat16"),
    "dora-eager-unpacked": ("dora", "eager", "unpacked"),
    "rslora-sdpa-recompute": ("rslora", "sdpa", "recompute"),
    "pissa-dropout-loraplus-float16": ("pissa", "dropout", "loraplus", "float16"),
    "fp4-evaluation": ("fp4", "evaluation"),
    "tokens": ("tokens",),
    "modules-to-save": ("modules-to-save", "dense"),
    "full": ("full",),
}
KINDS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "bfloat16": ("model.dtype=bfloat16",),
    "float16": ("model.dtype=float16",),
    "sdpa": ("model.attention=sdpa",),
    "eager": ("model.attention=eager",),
    "unpacked": ("data.packing=false",),
    "recompute": ("memory.recompute=all",),
    "dropout": ("adapter.dropout=0.1",),
    "dora": ("adapter.kind=dora",),
    "rslora": ("adapter.kind=rslora",),
    "pissa": ("adapter.init=pissa",),
    "modules-to-save": ('adapter.save_modules=["embed_tokens","input_layernorm"]',),
    "tokens": ('adapter.tokens=["a"]', 'adapter.new_tokens=["<new>"]'),
    "fp4": ("quant.kind=fp4", "quant.double=false"),
    "dense": ("quant.kind=dense",),
    "full": ("adapter.kind=full", "adapter.rank=null", "adapter.alpha=null", "quant.kind=dense"),
    "loraplus": ("optim.loraplus_ratio=4",),
    "evaluation": ("data.eval_fraction=0.2", "train.eval_every=1"),
}
FAMILIES = ("qwen2", "gemma2", "gemma3", "phi3", "gpt_neox", "llama-tied-bias")
COMBINATIONS = {
    "dora-stream-offload": ("adapter.kind=dora", "memory.weights=stream", "memory.offload_activations=true"),
    "dropout-recompute": ("adapter.dropout=0.1", "memory.recompute=1", "adapter.kind=rslora"),
    "full-offloaded": (*KINDS["full"], "optim.kind=offloaded_adamw", "memory.recompute=all"),
    "tokens-offload": ('adapter.new_tokens=["<new>"]', "memory.offload_activations=true"),
    "deterministic": ("train.deterministic=true", "model.dtype=bfloat16"),
}


def test_every_kind_is_in_a_run() -> None:
    assert {kind for kinds in TOGETHER.values() for kind in kinds} == KINDS.keys()


@pytest.mark.sample(of=4)
@pytest.mark.parametrize("kinds", TOGETHER)
def test_every_kind_of_recipe_trains(runs: GpuRuns, kinds: str) -> None:
    run = runs.train(*(setting for kind in TOGETHER[kinds] for setting in KINDS[kind]))
    losses = [line["loss"] for line in metrics(run.folder)]
    assert losses and all(math.isfinite(loss) for loss in losses)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_alone_trains(runs: GpuRuns, kind: str) -> None:
    runs.train(*KINDS[kind])


@pytest.mark.parametrize("family", FAMILIES[:1])
def test_every_family_trains(runs: GpuRuns, family: str) -> None:
    runs.train("model.dtype=bfloat16", family=family)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES[1:])
def test_further_families_train(runs: GpuRuns, family: str) -> None:
    runs.train("model.dtype=bfloat16", "memory.weights=stream", "memory.offload_activations=true", family=family)


@pytest.mark.slow
@pytest.mark.parametrize("kind", COMBINATIONS)
def test_combinations_train(runs: GpuRuns, kind: str) -> None:
    runs.train(*COMBINATIONS[kind], family="qwen2", layers=3)
