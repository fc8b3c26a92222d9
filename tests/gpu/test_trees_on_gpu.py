"""Prefix trees on the pretended GPU: one kernel for all segments, the losses of the answers one by one."""

from pathlib import Path

import pytest
from support.gpu_runs import GpuRuns
from support.small_runs import metrics
from support.trees import write_rewritten

KERNEL = "torch_attn::_varlen_attn"


# Full attention, and a sliding window.
@pytest.mark.parametrize("family", ["llama", pytest.param("mistral", marks=pytest.mark.slow)])
def test_trees_train_in_one_kernel_as_their_answers_do(runs: GpuRuns, tmp_path: Path, family: str) -> None:
    folder = write_rewritten(tmp_path, 6)
    settings = (
        f"data.train={folder / 'records.jsonl'}", f"model.chat_template={folder / 'template.jinja'}",
        "data.max_length=256", "train.global_batch=64", "model.dtype=bfloat16", "train.max_steps=2",
    )  # fmt: skip
    trees, apart = (runs.train(*settings, f"model.attention={name}", family=family) for name in ("auto", "sdpa"))
    assert trees.counters.launches[KERNEL] and not apart.counters.launches[KERNEL]
    for line, other in zip(metrics(trees.folder), metrics(apart.folder), strict=True):
        assert line["trained_tokens"] == other["trained_tokens"]
        assert line["loss"] == pytest.approx(other["loss"], rel=3e-3)
