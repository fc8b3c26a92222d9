"""Packed documents give the logits and loss they give alone, on every attention backend; the probe detects leaks."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

from qlora.data.batching.collate import collate
from qlora.data.batching.join import join_documents
from qlora.data.types import IGNORED, Example
from qlora.errors import DataError
from qlora.model.attention import DOCUMENT_ATTENTION
from qlora.training import packing_probe
from qlora.training.loss import TokenLoss
from qlora.training.packing_probe import refuse_leaks

Zoo = Callable[..., Path]
FAMILIES = ("llama", "qwen3", "mistral", "gemma2", "gpt_neox", "phi3")  # full and sliding (32 tokens), GQA and not
HAVE_SDPA = tuple(family for family in FAMILIES if family != "gemma2")  # it soft-caps its scores, which SDPA can't
CPU = torch.device("cpu")
FAST = [
    *((family, backend) for family in HAVE_SDPA for backend in (DOCUMENT_ATTENTION, "sdpa", "eager")),
    ("gemma2", "eager"),
]
# Compiles for minutes on a CPU, if it runs there.
SLOW = [pytest.param(family, "flex_attention", marks=pytest.mark.slow) for family in ("llama", "qwen3", "gpt_neox")]


def loss_of(zoo: Zoo, family: str, backend: str) -> TokenLoss:
    """A tiny random model, frozen, with an attention backend."""
    model: Any = AutoModelForCausalLM.from_pretrained(zoo(family), dtype=torch.float32).eval()
    model.requires_grad_(False)
    model.set_attn_implementation(backend)
    return TokenLoss(model).eval()


def documents(seed: int, lengths: tuple[int, ...] = (9, 50, 33, 1, 40)) -> list[Example]:
    rng = np.random.default_rng(seed)
    examples = []
    for number, length in enumerate(lengths):
        ids = rng.integers(5, 250, length).astype(np.int32)
        examples.append(
            Example(f"rows.jsonl:{number + 1}", ids, np.where(np.arange(length) < length // 2, IGNORED, ids))
        )
    return examples


def logits_of(loss: TokenLoss, rows: list[Example]) -> Tensor:
    batch = collate(rows, pad_id=0)
    return loss.head(loss.head.hidden_states(batch.input_ids, batch.position_ids, batch.layout))


def sum_of(loss: TokenLoss, rows: list[Example]) -> float:
    batch = collate(rows, pad_id=0)
    return float(loss(batch.input_ids, batch.labels, batch.position_ids, batch.layout))


def require(loss: TokenLoss, backend: str) -> None:
    """Skip the test if this machine can't run the backend."""
    if backend != "flex_attention":
        return
    try:
        logits_of(loss, documents(0)[:1])
    except Exception as error:  # a missing compiler or operator
        pytest.skip(f"flex_attention does not run here: {type(error).__name__}: {str(error)[:80]}")


@pytest.mark.sample(of=4)
@pytest.mark.parametrize(("family", "backend"), [*FAST, *SLOW])
@torch.no_grad()
def test_packed_logits_and_loss_are_those_of_the_documents_alone(zoo: Zoo, family: str, backend: str) -> None:
    loss = loss_of(zoo, family, backend)
    require(loss, backend)
    apart = documents(0)
    rows = [join_documents(apart[:3]), join_documents(apart[3:])]  # the second one is padded
    packed = logits_of(loss, rows)
    scale = max(1.0, float(packed.std()))
    for index, row in enumerate(rows):
        ends = (*row.boundaries, len(row))
        for start, end in zip(row.document_starts(), ends, strict=True):
            alone = Example("x", row.input_ids[start:end], row.labels[start:end])
            difference = (packed[index, start:end] - logits_of(loss, [alone])[0]).abs().max()
            assert float(difference) <= 1e-5 * scale
    together, one_by_one = sum_of(loss, rows), sum(sum_of(loss, [example]) for example in apart)
    assert abs(together - one_by_one) <= 1e-6 * abs(one_by_one)


@pytest.mark.parametrize(("family", "backend"), [*FAST, *SLOW])
def test_the_probe_accepts_isolated_documents(zoo: Zoo, family: str, backend: str) -> None:
    loss = loss_of(zoo, family, backend)
    require(loss, backend)
    apart = documents(1)
    difference = refuse_leaks(loss, [apart[0], join_documents(apart)], torch.float32, CPU)
    assert difference is not None and difference <= 1e-5
    assert refuse_leaks(loss, apart, torch.float32, CPU) is None  # nothing is packed


class Varlen:
    """Like FlashAttention in transformers: documents by cumulative lengths, or by positions in a batch of one row."""

    def __init__(self, use_lengths: bool) -> None:
        self.use_lengths = use_lengths

    def __call__(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        assert mask is None
        (rows, _, length, _), bounds = query.shape, options.get("cu_seq_lens_q")
        if not self.use_lengths or bounds is None:
            bounds = range(0, rows * length + 1, length) if rows > 1 else _bounds_of(options["position_ids"])
        groups = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        flat = [tensor.transpose(1, 2).flatten(0, 1).transpose(0, 1) for tensor in (query, key, value)]
        outputs = [
            F.scaled_dot_product_attention(*(tensor[None, :, a:b] for tensor in flat), is_causal=True)
            for a, b in pairwise(int(end) for end in bounds)
        ]
        return torch.cat(outputs, dim=2)[0].transpose(0, 1).unflatten(0, (rows, length)), None


def _bounds_of(positions: Tensor) -> list[int]:
    return [*(positions[0] == 0).nonzero()[:, 0].tolist(), positions.shape[1]]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
@torch.no_grad()
def test_a_kernel_of_cumulative_lengths_isolates_several_packed_rows(zoo: Zoo, family: str) -> None:
    """FlashAttention itself needs a GPU; this kernel takes the same arguments."""
    for use_lengths in (True, False):
        AttentionInterface.register("flash_reference", Varlen(use_lengths))
        AttentionMaskInterface.register("flash_reference", lambda *sizes, **options: None)
        loss, apart = loss_of(zoo, family, "eager"), documents(0)
        loss.head.decoder.config._attn_implementation = "flash_reference"  # set_attn_implementation checks the name
        if not use_lengths:  # one packed row is isolated, two are not, and the probe detects it
            assert_refused(loss)
            continue
        assert refuse_leaks(loss, [join_documents(apart)], torch.float32, CPU) is not None
        together = sum_of(loss, [join_documents(apart[:3]), join_documents(apart[3:])])
        one_by_one = sum(sum_of(loss, [example]) for example in apart)
        assert abs(together - one_by_one) <= 1e-6 * abs(one_by_one)


def all_ones_mask(loss: TokenLoss, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask that trainers pass for a row without padding: with it, transformers detects no packing."""
    decoder = loss.head.decoder
    forward = decoder.forward

    def masked(input_ids: Tensor, documents: Any = None, **options: Any) -> Any:
        return forward(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), **options)

    monkeypatch.setattr(decoder, "forward", masked)


def continuous_positions(loss: TokenLoss, monkeypatch: pytest.MonkeyPatch) -> None:
    """Document boundaries do not reach the model."""
    original = packing_probe.collate

    def flat(rows: list[Example], pad_id: int) -> Any:
        unmarked = [Example(row.where, row.input_ids, row.labels) for row in rows]
        return original(unmarked, pad_id)

    monkeypatch.setattr(packing_probe, "collate", flat)


def documents_not_passed(loss: TokenLoss, monkeypatch: pytest.MonkeyPatch) -> None:
    """The document attention kernel gets no document starts."""
    decoder = loss.head.decoder
    forward = decoder.forward

    def without_documents(input_ids: Tensor, position_ids: Tensor, use_cache: bool, **documents: Any) -> Any:
        return forward(input_ids=input_ids, position_ids=position_ids, use_cache=use_cache)

    monkeypatch.setattr(decoder, "forward", without_documents)


LEAKS = {"an all-ones mask": all_ones_mask, "continuous positions": continuous_positions}


@pytest.mark.sample(of=8, every=("leak", "backend"))
@pytest.mark.parametrize("leak", LEAKS)
@pytest.mark.parametrize(("family", "backend"), [*FAST, *SLOW])
def test_every_planted_leak_is_refused(
    zoo: Zoo, family: str, backend: str, leak: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = loss_of(zoo, family, backend)
    require(loss, backend)
    LEAKS[leak](loss, monkeypatch)
    assert_refused(loss)


@pytest.mark.parametrize("family", HAVE_SDPA)
def test_document_attention_without_documents_is_refused(
    zoo: Zoo, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = loss_of(zoo, family, DOCUMENT_ATTENTION)
    documents_not_passed(loss, monkeypatch)
    assert_refused(loss)


def assert_refused(loss: TokenLoss) -> None:
    for seed in range(5):
        with pytest.raises(DataError, match="packed documents attend to each other"):
            refuse_leaks(loss, [join_documents(documents(seed))], torch.float32, CPU)


@pytest.mark.sample(of=8, every=("dtype", "backend"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("family", "backend"), FAST)
def test_in_half_precision_rounding_passes_and_a_leak_does_not(
    zoo: Zoo, family: str, backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = loss_of(zoo, family, backend).to(dtype)
    rows = [join_documents(documents(2))]
    assert refuse_leaks(loss, rows, dtype, CPU) is not None
    all_ones_mask(loss, monkeypatch)
    with pytest.raises(DataError, match="packed documents attend to each other"):
        refuse_leaks(loss, rows, dtype, CPU)
