"""Passes over a base whose matrices stay on disk: the error of each matrix, the KL of a choice to the 16-bit base."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora.data.batching.collate import Batch, collate
from qlora.data.types import Example
from qlora.memory.activation_recompute import decoder_layers, recompute
from qlora.model.lm_head import Head
from qlora.model.measured_linear import MeasuredBase

DRAWS = 4  # of a next token for every position: the estimate of a document is a square, whose variance they lower
Progress = Callable[[int, int], None]


def measure_errors(
    base: MeasuredBase, sequences: Sequence[Example], seed: int, report: Progress = lambda done, total: None
) -> None:
    """Fill the sums of every matrix: one forward and backward for each sequence and draw; layers recompute."""
    model: Any = base.model
    # Frozen, nothing would need a gradient: the embedding's output starts the graph.
    hook = model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    recompute(model, None)
    layers = decoder_layers(model)
    for layer in layers:
        layer.training = True  # the switch of recomputation, without its children's dropout
    head, total = Head(model), DRAWS * len(sequences)
    generator = torch.Generator(head.weight.device).manual_seed(seed)
    base.mode = "measured"
    for draw in range(DRAWS):
        for number, sequence in enumerate(sequences):
            _measure(base, head, sequence, generator)
            report(draw * len(sequences) + number + 1, total)
    hook.remove()
    recompute(model, 0)
    for layer in layers:
        layer.training = False
    base.mode, base.documents = "original", None


def _measure(base: MeasuredBase, head: Head, sequence: Example, generator: torch.Generator) -> None:
    """One forward and backward of log p(y) of tokens y drawn from the model's own distribution."""
    device = head.weight.device
    starts = torch.tensor([*sequence.document_starts(), len(sequence)])
    base.documents = torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff()).to(device)
    hidden = _hidden(head, collate([sequence], pad_id=0).to(device))
    gradient = torch.empty_like(hidden)
    for rows in torch.arange(len(hidden), device=device).split(head.chunk_rows()):
        part = hidden.detach()[rows].requires_grad_()
        with torch.enable_grad():
            log_probs = head(part).log_softmax(-1)
            tokens = torch.multinomial(log_probs.detach().exp(), 1, generator=generator)
            (gradient[rows],) = torch.autograd.grad(log_probs.gather(-1, tokens).sum(), part)
    hidden.backward(gradient)
    base.measured_tokens.append(len(sequence))


@torch.no_grad()
def measure_kl(base: MeasuredBase, sequences: Sequence[Example], kept: Sequence[frozenset[str]]) -> list[float]:
    """KL(16-bit base || quantized base) in nats per token, for each set of matrices that stay in 16 bits."""
    head, device = Head(base.model), Head(base.model).weight.device
    sums = torch.zeros(len(kept), dtype=torch.float64)
    for sequence in sequences:
        batch = collate([sequence], pad_id=0).to(device)
        base.mode = "original"
        original = _hidden(head, batch)
        for number, names in enumerate(kept):
            base.mode, base.kept = "stored", names
            stored = _hidden(head, batch)
            for rows in torch.arange(len(stored), device=device).split(max(1, head.chunk_rows() // 4)):
                expected, actual = (head(states[rows]).log_softmax(-1) for states in (original, stored))
                sums[number] += F.kl_div(actual, expected, log_target=True, reduction="sum").double().cpu()
    base.mode = "original"
    return (sums.clamp_min(0) / sum(map(len, sequences))).tolist()  # type: ignore[no-any-return]


def _hidden(head: Head, batch: Batch) -> Tensor:
    """Last hidden states [T, H] of one sequence."""
    return head.hidden_states(batch.input_ids, batch.position_ids, batch.layout)[0]
