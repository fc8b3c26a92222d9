"""Multiple choice (MMLU): the answer is the offered letter with the largest logit."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from qlora.data.batching.collate import collate
from qlora.data.formats.completion import LETTERS
from qlora.data.prefix_tree import paths_of
from qlora.data.types import IGNORED, Example
from qlora.errors import DataError
from qlora.training.loss import TokenLoss

OFFERED = re.compile(rf"^\s*\(?([{LETTERS}])[).:]", re.MULTILINE)  # `A. ...`, `B) ...`, `(C) ...` on a line of its own
DEFAULT_LETTERS = 4  # number of letters assumed where the question lists none


@dataclass(frozen=True)
class MultipleChoice:
    """A question up to the answer letter, the token ids of the offered letters, and the index of the correct one."""

    example: Example  # the tokens before the letter; labels are not used
    letter_ids: tuple[int, ...]
    correct: int


def choice_of(example: Example, tokenizer: Any) -> MultipleChoice:
    """The last answer of an example as a choice of letters. DataError if its question does not offer that letter."""
    example = paths_of(example)[-1]  # of a prefix tree the last answer, which has the longest context
    trained = np.flatnonzero(np.asarray(example.labels) != IGNORED)
    gaps = np.flatnonzero(np.diff(trained) > 1)
    start, end = int(trained[gaps[-1] + 1] if len(gaps) else trained[0]), int(trained[-1]) + 1
    ids = np.asarray(example.input_ids).tolist()
    answer = str(tokenizer.decode(ids[start:end], skip_special_tokens=True)).strip()
    letter = answer.strip("(). :")
    offered = OFFERED.findall(str(tokenizer.decode(ids[:start], skip_special_tokens=True)))
    letters = list(dict.fromkeys(offered)) or list(LETTERS[:DEFAULT_LETTERS])
    if letter not in letters:
        raise DataError(
            f"{example.where}: the answer is {answer[:40]!r}; --task choice needs one of the letters "
            f"{', '.join(letters)}, which the question offers. Use --task exact-match for other answers."
        )
    position = next(index for index in range(start, end) if letter in tokenizer.decode([ids[index]]))
    prompt = Example(example.where, np.asarray(ids[:position], np.int32), np.full(position, IGNORED, np.int32))
    return MultipleChoice(prompt, _letter_ids(ids[position], letter, letters, tokenizer), letters.index(letter))


def _letter_ids(token_id: int, letter: str, letters: Sequence[str], tokenizer: Any) -> tuple[int, ...]:
    """The token ids of all letters in the form of this letter's token: with the same leading space."""
    token = str(tokenizer.convert_ids_to_tokens(token_id))
    ids = [tokenizer.convert_tokens_to_ids(token.replace(letter, other)) for other in letters]
    if len(set(ids)) < len(letters) or None in ids or token.count(letter) != 1:
        raise DataError(
            f"--task choice: this tokenizer has no separate token for each of {', '.join(letters)}. "
            "Use --task exact-match."
        )
    return tuple(int(token_id) for token_id in ids)


@torch.no_grad()
def choice_accuracy(
    model: nn.Module, choices: Sequence[MultipleChoice], micro_batch: int, device: torch.device
) -> float:
    """The fraction of questions whose correct letter has the largest logit; ties go to the earlier letter."""
    training, head = model.training, TokenLoss(model.eval()).head
    order = sorted(range(len(choices)), key=lambda index: len(choices[index].example))
    correct = 0
    for start in range(0, len(order), micro_batch):
        group = [choices[index] for index in order[start : start + micro_batch]]
        batch = collate([choice.example for choice in group], pad_id=0).to(device)
        hidden = head.hidden_states(batch.input_ids, batch.position_ids, batch.layout)
        for row, choice in enumerate(group):
            logits = head(hidden[row, len(choice.example) - 1])[list(choice.letter_ids)]
            correct += int(logits.argmax()) == choice.correct
    model.train(training)
    return correct / max(1, len(choices))
