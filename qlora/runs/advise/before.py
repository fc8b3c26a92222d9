"""`qlora advise RECIPE`: what the rows are like and what the base can do already: prompt, retrieve, or train, and how.

Every figure is measured here; judgement.py says what they come to.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from qlora.data.data_report import DataReport
from qlora.data.prepare import Prepared, prepare
from qlora.data.types import IGNORED, Example
from qlora.distributed.single import Single
from qlora.errors import DataError
from qlora.runs.advise.verdict import GRAM, LARGEST_RANK, NEAR, judge
from qlora.runs.memory_setup import load_base, plan_here
from qlora.recipe.planning import Machine, plan_of
from qlora.recipe.recipe import Recipe
from qlora.recipe.dataset_profile import context_of, encoder_of
from qlora.training.eval_loss import evaluate
from qlora.training.loss import TokenLoss

COMPARED_ROWS = 256  # held-out rows that are looked up among the training rows
SHOTS = 4  # training rows shown to the base before a held-out one
WORD, CONTROL = re.compile(r"[^\W_]{3,}"), re.compile(r"<[^<>\s]{1,24}>")  # control tokens are no words
Say = Callable[[str], None]


def advise_before(recipe: Recipe, rows: int, say: Say = lambda line: None) -> dict[str, Any]:
    """What `qlora advise RECIPE --json` answers; `rows` held-out rows are scored with the base, 0 leaves that out.

    DataError if no row can be trained on, or none is held out; BaseModelError.
    """
    encoder = encoder_of(recipe)
    prepared = prepare(_unpacked(recipe), encoder, recipe.train.seed)
    prepared.report.refuse()
    if not prepared.eval:
        raise DataError("data.eval_fraction: no rows are held out, so nothing can be told from them. Hold some out.")
    found = {
        "data": _data(recipe, prepared),
        "novelty": novelty(prepared, encoder.decode),
        "few_shot": few_shot(recipe, prepared, rows, say) if rows else None,
    }
    verdict, reasons = judge(found)
    return {**found, "verdict": verdict, "reasons": [asdict(reason) for reason in reasons]}


def _unpacked(recipe: Recipe) -> Any:
    return recipe.data.model_copy(update={"packing": False})


def _data(recipe: Recipe, prepared: Prepared) -> dict[str, Any]:
    report: DataReport = prepared.report
    largest = recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update={"rank": LARGEST_RANK})})
    return {
        "rows": report.rows,
        "kept": report.kept,
        "held_out": report.eval_rows,
        "trained_tokens": report.trained_tokens,
        "duplicates": report.duplicates,
        "overlap": report.overlap,
        "contradictions": contradictions(prepared.train),
        "largest_adapter_parameters": plan_of(largest, Machine(2**50)).work.adapters.values,
    }


def contradictions(rows: Sequence[Example]) -> int:
    """Rows whose prompt stands elsewhere with another answer: noise that no training can fit."""
    answers: dict[bytes, Counter[bytes]] = {}
    for row in rows:
        begins = int(np.argmax(row.labels != IGNORED))
        prompt, answer = row.input_ids[:begins].tobytes(), row.input_ids[begins:].tobytes()
        answers.setdefault(prompt, Counter())[answer] += 1
    return sum(
        sum(counts.values()) - counts.most_common(1)[0][1] for prompt, counts in answers.items() if prompt and counts
    )


def novelty(prepared: Prepared, decode: Callable[[Any], str]) -> dict[str, Any]:
    """How new the held-out rows are: the share near a training row, and of their answers' words seen nowhere before."""
    held = prepared.eval[:COMPARED_ROWS]
    return {"rows": len(held), "near": _near(prepared.train, held), "unseen_words": _unseen(prepared, held, decode)}


def _near(train: Sequence[Example], held: Sequence[Example]) -> float:
    """The share of `held` that share NEAR of their runs with one training row; what frames every row is no run."""
    wanted = [grams(row) for row in held]
    asked = set().union(*wanted)
    places: dict[bytes, list[int]] = {}
    for index, row in enumerate(train):
        for gram in grams(row) & asked:
            places.setdefault(gram, []).append(index)
    frame = {gram for gram, rows in places.items() if len(rows) > len(train) / 2}
    near = 0
    for runs in wanted:
        telling = runs - frame
        shared = Counter(index for gram in telling for index in places.get(gram, ()))
        near += bool(telling) and shared.total() > 0 and shared.most_common(1)[0][1] >= NEAR * len(telling)
    return near / len(held)


def grams(row: Example) -> set[bytes]:
    """The runs of GRAM tokens in a row; a shorter row is one run."""
    ids = row.input_ids
    return {ids[start : start + GRAM].tobytes() for start in range(max(1, len(ids) - GRAM + 1))}


def _unseen(prepared: Prepared, held: Sequence[Example], decode: Callable[[Any], str]) -> float:
    """Of the words in the held-out answers, the share that is neither in the row's prompt nor in a training answer."""
    seen: set[str] = set()
    for row in prepared.train:
        seen |= _words(decode(row.input_ids[row.labels != IGNORED]))
    new = told = 0
    for row in held:
        words = _words(decode(row.input_ids[row.labels != IGNORED]))
        told += len(words)
        new += len(words - seen - _words(decode(row.input_ids[row.labels == IGNORED])))
    return new / told if told else 0.0


def _words(text: str) -> set[str]:
    return {word.lower() for word in WORD.findall(CONTROL.sub(" ", text))}


def few_shot(recipe: Recipe, prepared: Prepared, rows: int, say: Say) -> dict[str, Any]:
    """The base's loss on held-out rows, asked plainly and after a few training rows: what a prompt alone gives.

    In-context examples as in Brown et al. 2020, arXiv:2005.14165. Both losses are over the same rows: those that leave
    room for the examples in the model's context.
    """
    room = context_of(recipe.model.name, recipe.model.revision)
    shots = shown(prepared.train, room // 2)
    room -= sum(map(len, shots))
    held = [row for row in prepared.eval if len(row) <= room][:rows] if shots else list(prepared.eval[:rows])
    base = load_base(recipe, Single().device, plan_here(recipe), say)
    scored = [held, [behind(shots, row) for row in held]] if shots else [held]
    found = [evaluate(TokenLoss(base.model), each, recipe.train.micro_batch, Single()) for each in scored]
    losses = [each.loss for each in found if each]
    return {
        "rows": len(held),
        "shots": len(shots),
        "loss": losses[0],
        "few_shot_loss": losses[1] if shots else None,
    }


def shown(train: Sequence[Example], room: int) -> list[Example]:
    """The first training rows that fit together in `room` tokens, at most SHOTS of them."""
    found: list[Example] = []
    for row in train[: 16 * SHOTS]:
        if len(found) < SHOTS and sum(map(len, found)) + len(row) <= room:
            found.append(row)
    return found


def behind(shots: Sequence[Example], row: Example) -> Example:
    """`row` after `shots` in one document: only its own tokens are scored."""
    ids = np.concatenate([*(each.input_ids for each in shots), row.input_ids])
    silent = np.full(len(ids) - len(row), IGNORED, dtype=row.labels.dtype)
    labels = np.concatenate([silent, row.labels])
    return Example(row.where, ids, labels)
