"""AdamW whose moments wait in main memory and pass through the device in pieces, in every update.

For machines whose driver does not page managed memory (Windows, WSL, some clouds), where the state of bitsandbytes'
paged optimisers stays on the card. On a CPU the same code runs, and gives the bits of PyTorch's fused AdamW.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from qlora.memory.copy_stream import CopyStream, host_bytes

PIECE_VALUES = 2**22  # of each moment on the device at a time, twice: one piece in use, one on its way
SLOTS = 2
MOMENTS = ("exp_avg", "exp_avg_sq")


class Span(NamedTuple):
    """Values start..end of a flattened parameter."""

    parameter: nn.Parameter
    start: int
    end: int

    def of(self, tensor: Tensor) -> Tensor:
        """The span's part of a tensor as large as the parameter, which lies in one piece."""
        return tensor.view(-1)[self.start : self.end]


TextPiece = list[Span]


class OffloadedAdamw(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101) over parameters of one device, its moments in main memory which that device reads."""

    def __init__(self, groups: Sequence[dict[str, Any]], betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(list(groups), {"lr": 1e-3, "betas": betas, "eps": 1e-8, "weight_decay": weight_decay})
        self.lane = CopyStream(self.param_groups[0]["params"][0].device)
        self._slots: list[Tensor] = []

    def new_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Moments of zero in main memory, and the count of updates beside the parameter."""
        count = torch.zeros((), device=parameter.device)
        moments = {name: host_bytes(4 * parameter.numel(), self.lane.device).zero_() for name in MOMENTS}
        return {"step": count} | {name: flat.view(torch.float32).view_as(parameter) for name, flat in moments.items()}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update: while a piece is computed, the next one comes and the last one leaves."""
        work = [(group, piece) for group in self.param_groups for piece in self._pieces(group)]
        self._make_slots([piece for _, piece in work])
        marks = [self._send(number, piece) for number, (_, piece) in enumerate(work[:1])]
        for number, (group, piece) in enumerate(work):
            if number + 1 < len(work):
                marks.append(self._send(number + 1, work[number + 1][1]))
            self.lane.wait(marks[number])
            self._update(group, number, piece)
            self.lane.follow()
            for here, away in self._places(number, piece):
                self.lane.copy(away, here)
        self.lane.finish()  # so that whoever saves the moments finds them whole

    def _pieces(self, group: dict[str, Any]) -> Iterator[TextPiece]:
        """The parameters that have a gradient, cut and put together to at most PIECE_VALUES."""
        piece, values = TextPiece(), 0
        for span in self._spans(group["params"]):
            size = span.end - span.start
            if piece and values + size > PIECE_VALUES:
                yield piece
                piece, values = TextPiece(), 0
            piece.append(span)
            values += size
        if piece:
            yield piece

    def _spans(self, parameters: Sequence[nn.Parameter]) -> Iterator[Span]:
        for parameter in parameters:
            if parameter.grad is None:
                continue
            if not self.state[parameter]:
                self.state[parameter] = self.new_state(parameter)
            for start in range(0, parameter.numel(), PIECE_VALUES):
                end = min(parameter.numel(), start + PIECE_VALUES)
                yield Span(parameter, start, end)

    def _make_slots(self, pieces: Sequence[TextPiece]) -> None:
        """Memory on the device for two pieces, both moments, as large as the largest piece needs."""
        values = max((len(MOMENTS) * sum(span.end - span.start for span in piece) for piece in pieces), default=0)
        if not self._slots or self._slots[0].numel() < values:
            self._slots = [torch.empty(values, device=self.lane.device) for _ in range(min(SLOTS, len(pieces)))]

    def _send(self, number: int, piece: TextPiece) -> Any:
        """Queue a piece's moments into its slot. What left that slot before is ahead in the same queue."""
        for here, away in self._places(number, piece):
            self.lane.copy(here, away)
        return self.lane.mark()

    def _places(self, number: int, piece: TextPiece) -> Iterator[tuple[Tensor, Tensor]]:
        """Each moment of each span: where it is on the device, and where in main memory."""
        slot, start = self._slots[number % SLOTS], 0
        for name in MOMENTS:
            for span in piece:
                size = span.end - span.start
                yield slot[start : start + size], span.of(self.state[span.parameter][name])
                start += size

    def _update(self, group: dict[str, Any], number: int, piece: TextPiece) -> None:
        here = [place for place, _ in self._places(number, piece)]
        counts = [self.state[span.parameter]["step"] for span in piece]
        # A parameter of several spans is counted once, with its first, which fills a piece of its own.
        counts = [count if not span.start else count - 1 for span, count in zip(piece, counts, strict=True)]
        adamw(
            [span.of(span.parameter) for span in piece],
            [span.of(span.parameter.grad.contiguous()) for span in piece],  # type: ignore[union-attr]  # all have one
            here[: len(piece)],
            here[len(piece) :],
            [],
            counts,
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
