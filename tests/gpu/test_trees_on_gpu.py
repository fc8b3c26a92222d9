"""Prefix trees on the pretended GPU: one kernel for all segments, the losses of the answers one by one."""

from pathlib import Path

import pytest
import torch
from support.gpu_runs import GpuRuns, checked_gpu
from support.small_runs import metrics
from support.trees import write_rewritten

from qlora.data.types import Branch
from qlora.model.attention import documents_of
from qlora.model.path_keys import SegmentBounds
from qlora.model.varlen_attention import attention_with_contexts, varlen_attention

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


def test_the_keys_of_branches_are_not_kept_for_backward() -> None:
    """Query, key and value are saved; gradients are those of the kernel on gathered keys."""
    branches = ((Branch(8, 3), Branch(12, 6), Branch(16, 6)),)
    saved: list[int] = []
    with checked_gpu(), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(len(t)) or t, lambda t: t):
        gpu = torch.device("cuda")
        documents = documents_of(((0,),), 20, gpu, branches)
        assert documents.contexts is not None and len(documents.contexts.indices) > 30
        bounds = SegmentBounds(documents.cu_seqlens, documents.max_length)
        shapes = ((20, 4, 16), (20, 2, 16), (20, 2, 16))
        leaves = [torch.randn(shape, dtype=torch.bfloat16).to(gpu).requires_grad_() for shape in shapes]
        output = attention_with_contexts(leaves, bounds, documents.contexts, None, None)
        assert saved == [20, 20, 20]
        gradients = torch.autograd.grad(output.float().square().sum(), leaves)
        gathered = [leaves[0], *(leaf.index_select(0, documents.contexts.indices) for leaf in leaves[1:])]
        expected = varlen_attention(gathered, bounds, documents.contexts.bounds, None, None)
        references = torch.autograd.grad(expected.float().square().sum(), leaves)
        assert all(torch.equal(one, other) for one, other in zip(gradients, references, strict=True))
