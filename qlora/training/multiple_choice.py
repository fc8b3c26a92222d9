"""Multiple choice, MMLU style: of the letters a question offers, the one with the largest logit."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from qlora.data.batching.collate import collate
from qlora.data.types import IGNORED, Example
from qlora.errors import DataError
from qlora.training.loss import TokenLoss

LETTERS = "ABCDEFGHIJ"
OFFERED = re.compile(rf"^\s*\(?([{LETTERS}])[).:]", re.MULTILINE)  # `A. ...`, `B) ...`, `(C) ...` on a line of its own
SHORTEST = 4  # letters that are taken to be offered where the question lists none


@dataclass(frozen=True)
class MultipleChoice:
    """A question up to where its letter is due, the ids of the letters it offers, and which of them is right."""

    example: Example  # as far as the letter; no label matters
    ids: tuple[int, ...]
    right: int


def choice_of(example: Example, tokenizer: Any) -> MultipleChoice:
    """The row's last answer as a choice of letters. DataError if it is not one of the letters its question offers."""
    trained = np.flatnonzero(np.asarray(example.labels) != IGNORED)
    gaps = np.flatnonzero(np.diff(trained) > 1)
    start, end = int(trained[gaps[-1] + 1] if len(gaps) else trained[0]), int(trained[-1]) + 1
    ids = np.asarray(example.input_ids).tolist()
    answer = str(tokenizer.decode(ids[start:end], skip_special_tokens=True)).strip()
    letter = answer.strip("(). :")
    offered = OFFERED.findall(str(tokenizer.decode(ids[:start], skip_special_tokens=True)))
    known = list(dict.fromkeys(offered)) or list(LETTERS[:SHORTEST])
    if letter not in known:
        raise DataError(
            f"{example.where}: the answer is {answer[:40]!r}; --task choice needs one of the letters "
            f"{', '.join(known)}, which the question offers. Use --task exact-match for other answers."
        )
    place = next(at for at in range(start, end) if letter in tokenizer.decode([ids[at]]))
    shown = Example(example.where, np.asarray(ids[:place], np.int32), np.full(place, IGNORED, np.int32))
    return MultipleChoice(shown, _siblings(ids[place], letter, known, tokenizer), known.index(letter))


def _siblings(token: int, letter: str, known: Sequence[str], tokenizer: Any) -> tuple[int, ...]:
    """The ids of the other letters as they would stand in this letter's place: with the same space before them."""
    piece = str(tokenizer.convert_ids_to_tokens(token))
    found = [tokenizer.convert_tokens_to_ids(piece.replace(letter, other)) for other in known]
    if len(set(found)) < len(known) or None in found or piece.count(letter) != 1:
        raise DataError(f"--task choice: this tokenizer has no token of its own for each of {', '.join(known)}.")
    return tuple(int(each) for each in found)


@torch.no_grad()
def choice_share(model: nn.Module, choices: Sequence[MultipleChoice], micro_batch: int, device: torch.device) -> float:
    """The share of questions whose right letter has the largest logit; ties go to the earlier letter."""
    training, head = model.training, TokenLoss(model.eval()).head
    order = sorted(range(len(choices)), key=lambda row: len(choices[row].example))
    right = 0
    for start in range(0, len(order), micro_batch):
        rows = [choices[row] for row in order[start : start + micro_batch]]
        batch = collate([row.example for row in rows], pad_id=0).to(device)
        hidden = head.hidden(batch.input_ids, batch.position_ids, batch.starts)
        for place, row in enumerate(rows):
            logits = head(hidden[place, len(row.example) - 1])[list(row.ids)]
            right += int(logits.argmax()) == row.right
    model.train(training)
    return right / max(1, len(choices))
