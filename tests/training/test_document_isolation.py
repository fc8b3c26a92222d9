"""Packed documents give the logits and the loss they give alone, on every attention backend; the probe sees leaks."""

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
from qlora.data.batching.packing import join
from qlora.data.types import IGNORED, Example
from qlora.errors import DataError
from qlora.model.attention import NAME
from qlora.model.lm_head import Head
from qlora.training import packing_probe
from qlora.training.loss import TokenLoss
from qlora.training.packing_probe import refuse_leaks

Zoo = Callable[..., Path]
FAMILIES = ("llama", "qwen3", "mistral", "gemma2", "gpt_neox", "phi3")  # full and sliding (32 tokens), GQA and not
HAVE_SDPA = tuple(family for family in FAMILIES if family != "gemma2")  # it caps its scores, which SDPA can't
CPU = torch.device("cpu")
FAST = [*((family, backend) for family in HAVE_SDPA for backend in (NAME, "sdpa", "eager")), ("gemma2", "eager")]
# Compiled for minutes on a CPU, where it runs at all.
SLOW = [pytest.param(family, "flex_attention", marks=pytest.mark.slow) for family in ("llama", "qwen3", "gpt_neox")]


def loss_of(zoo: Zoo, family: str, backend: str) -> TokenLoss:
    """A tiny random model, frozen, on a backend of transformers or our own."""
    model: Any = AutoModelForCausalLM.from_pretrained(zoo(family), dtype=torch.float32).eval()
    model.requires_grad_(False)
    model.set_attn_implementation(backend)
    return TokenLoss(model).eval()


def documents(seed: int, lengths: tuple[int, ...] = (9, 50, 33, 1, 40)) -> list[Example]:
    draw = np.random.default_rng(seed)
    made = []
    for number, length in enumerate(lengths):
        ids = draw.integers(5, 250, length).astype(np.int32)
        made.append(Example(f"rows.jsonl:{number + 1}", ids, np.where(np.arange(length) < length // 2, IGNORED, ids)))
    return made


def logits_of(loss: TokenLoss, rows: list[Example]) -> Tensor:
    batch = collate(rows, pad_id=0)
    return loss.head(loss.head.hidden(batch.input_ids, batch.position_ids, batch.starts))


def sum_of(loss: TokenLoss, rows: list[Example]) -> float:
    batch = collate(rows, pad_id=0)
    return float(loss(batch.input_ids, batch.labels, batch.position_ids, batch.starts))


def require(loss: TokenLoss, backend: str) -> None:
    """Skip, with the reason, where this machine can't run the backend at all."""
    if backend != "flex_attention":
        return
    try:
        logits_of(loss, documents(0)[:1])
    except Exception as error:  # a compiler that is not there, an operator that is not built
        pytest.skip(f"flex_attention does not run here: {type(error).__name__}: {str(error)[:80]}")


@pytest.mark.parametrize(("family", "backend"), [*FAST, *SLOW])
@torch.no_grad()
def test_packed_logits_and_loss_are_those_of_the_documents_alone(zoo: Zoo, family: str, backend: str) -> None:
    loss = loss_of(zoo, family, backend)
    require(loss, backend)
    apart = documents(0)
    rows = [join(apart[:3]), join(apart[3:])]  # the second one is padded
    packed = logits_of(loss, rows)
    scale = max(1.0, float(packed.std()))
    for place, row in enumerate(rows):
        ends = (*row.boundaries, len(row))
        for start, end in zip(row.starts(), ends, strict=True):
            alone = Example("x", row.input_ids[start:end], row.labels[start:end])
            difference = (packed[place, start:end] - logits_of(loss, [alone])[0]).abs().max()
            assert float(difference) <= 1e-5 * scale
    together, one_by_one = sum_of(loss, rows), sum(sum_of(loss, [example]) for example in apart)
    assert abs(together - one_by_one) <= 1e-6 * abs(one_by_one)


@pytest.mark.parametrize(("family", "backend"), [*FAST, *SLOW])
def test_the_probe_lets_what_is_isolated_pass(zoo: Zoo, family: str, backend: str) -> None:
    loss = loss_of(zoo, family, backend)
    require(loss, backend)
    apart = documents(1)
    found = refuse_leaks(loss, [apart[0], join(apart)], torch.float32, CPU)
    assert found is not None and found <= 1e-5
    assert refuse_leaks(loss, apart, torch.float32, CPU) is None  # nothing is packed


class Varlen:
    """As FlashAttention in transformers: documents by running sums; without them by positions, of a single row only."""

    def __init__(self, told: bool) -> None:
        self.told = told

    def __call__(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        assert mask is None
        (rows, _, length, _), sums = query.shape, options.get("cu_seq_lens_q")
        if not self.told or sums is None:
            sums = range(0, rows * length + 1, length) if rows > 1 else _sums_of(options["position_ids"])
        groups = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        flat = [tensor.transpose(1, 2).flatten(0, 1).transpose(0, 1) for tensor in (query, key, value)]
        parts = [
            F.scaled_dot_product_attention(*(tensor[None, :, a:b] for tensor in flat), is_causal=True)
            for a, b in pairwise(int(end) for end in sums)
        ]
        return torch.cat(parts, dim=2)[0].transpose(0, 1).unflatten(0, (rows, length)), None


def _sums_of(positions: Tensor) -> list[int]:
    return [*(positions[0] == 0).nonzero()[:, 0].tolist(), positions.shape[1]]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
@torch.no_grad()
def test_a_kernel_of_running_sums_keeps_several_packed_rows_apart(zoo: Zoo, family: str) -> None:
    """FlashAttention itself needs a card; this reads the same arguments."""
    for told in (True, False):
        AttentionInterface.register("flash_reference", Varlen(told))
        AttentionMaskInterface.register("flash_reference", lambda *sizes, **options: None)
        loss, apart = loss_of(zoo, family, "eager"), documents(0)
        loss.head._parts[0].config._attn_implementation = "flash_reference"  # set by name, it would be looked for
        if not told:  # as without running sums: one packed row is kept apart, two are not, and the probe sees it
            assert_refused(loss)
            continue
        assert refuse_leaks(loss, [join(apart)], torch.float32, CPU) is not None
        together = sum_of(loss, [join(apart[:3]), join(apart[3:])])
        one_by_one = sum(sum_of(loss, [example]) for example in apart)
        assert abs(together - one_by_one) <= 1e-6 * abs(one_by_one)


def all_ones_mask(loss: TokenLoss, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask that trainers hand to the model for a row without pads: with it, nothing looks packed."""
    decoder = loss.head._parts[0]
    forward = decoder.forward

    def masked(input_ids: Tensor, documents: Any = None, **options: Any) -> Any:
        return forward(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), **options)

    monkeypatch.setattr(decoder, "forward", masked)


def positions_that_count_on(loss: TokenLoss, monkeypatch: pytest.MonkeyPatch) -> None:
    """Boundaries are lost on the way to the model."""
    original = packing_probe.collate

    def flat(rows: list[Example], pad_id: int) -> Any:
        bare = [Example(row.where, row.input_ids, row.labels) for row in rows]
        return original(bare, pad_id)

    monkeypatch.setattr(packing_probe, "collate", flat)


def documents_not_passed(loss: TokenLoss, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own kernel is not told where documents begin."""
    monkeypatch.setattr(Head, "_boundaries", lambda self, starts, input_ids: {})


LEAKS = {"an all-ones mask": all_ones_mask, "positions count on": positions_that_count_on}


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
def test_our_kernel_not_told_of_the_documents_is_refused(
    zoo: Zoo, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = loss_of(zoo, family, NAME)
    documents_not_passed(loss, monkeypatch)
    assert_refused(loss)


def assert_refused(loss: TokenLoss) -> None:
    for seed in range(5):
        with pytest.raises(DataError, match="packed documents see each other"):
            refuse_leaks(loss, [join(documents(seed))], torch.float32, CPU)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("family", "backend"), FAST)
def test_in_half_precision_rounding_passes_and_a_leak_does_not(
    zoo: Zoo, family: str, backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = loss_of(zoo, family, backend).to(dtype)
    rows = [join(documents(2))]
    assert refuse_leaks(loss, rows, dtype, CPU) is not None
    all_ones_mask(loss, monkeypatch)
    with pytest.raises(DataError, match="packed documents see each other"):
        refuse_leaks(loss, rows, dtype, CPU)
