"""`qlora advise RECIPE`: measurements of the data and of the base model: prompt, retrieve, or train, and how.

verdict.py turns the figures into a recommendation.
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
from qlora.recipe.dataset_profile import build_encoder, context_length
from qlora.recipe.literature import LARGEST_RANK, suggest_rate
from qlora.recipe.planning import Machine, Planner
from qlora.recipe.recipe import Recipe
from qlora.recipe.recommendations import recommend_adapter_settings
from qlora.runs.advise.verdict import NEAR, NGRAM, Reason, judge
from qlora.runs.memory_setup import Log, load_base, plan_if_known
from qlora.training.eval_loss import evaluate
from qlora.training.loss import TokenLoss

COMPARED_ROWS = 256  # held-out examples that are compared with the training set
SHOTS = 4  # training examples in the prompt before a held-out one
WORD, CONTROL = re.compile(r"[^\W_]{3,}"), re.compile(r"<[^<>\s]{1,24}>")  # control tokens do not count as words


def advise_before(recipe: Recipe, rows: int, log: Log = lambda line: None) -> dict[str, Any]:
    """The object of `qlora advise RECIPE --json`; `rows` held-out examples are evaluated with the base model.

    DataError if no record can be trained on, or no example is held out; BaseModelError.
    """
    encoder = build_encoder(recipe)
    section = recipe.data.model_copy(update={"packing": False})
    prepared = prepare(section, encoder, recipe.train.seed, shares_prefixes=False)
    prepared.report.raise_for_problems()
    if not prepared.eval:
        raise DataError(
            "data.eval_fraction: no examples are held out, and advise measures on held-out ones. Set it above 0."
        )
    result = {
        "data": _data(recipe, prepared),
        "novelty": measure_novelty(prepared, encoder.decode),
        "few_shot": measure_few_shot(recipe, prepared, rows, log) if rows else None,
    }
    verdict, reasons = judge(result)
    settings = recommend_adapter_settings(recipe, prepared.report, None, suggest_rate(recipe))
    reasons += [Reason(f"{key}: {message}", "docs/choosing.md") for key, message in settings]
    return {**result, "verdict": verdict, "reasons": [asdict(reason) for reason in reasons]}


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
        "contradictions": count_contradictions(prepared.train),
        "largest_adapter_parameters": Planner(largest).plan(Machine(2**50)).work.adapters.values,
    }


def count_contradictions(examples: Sequence[Example]) -> int:
    """Examples whose prompt also occurs with another answer: noise that no training can fit."""
    answers: dict[bytes, Counter[bytes]] = {}
    for example in examples:
        start = int(np.argmax(example.labels != IGNORED))
        if start < 2:  # plain text, or a piece of it
            continue
        prompt, answer = example.input_ids[:start].tobytes(), example.input_ids[start:].tobytes()
        answers.setdefault(prompt, Counter())[answer] += 1
    return sum(sum(counts.values()) - counts.most_common(1)[0][1] for counts in answers.values())


def measure_novelty(prepared: Prepared, decode: Callable[[Any], str]) -> dict[str, Any]:
    """How new the held-out examples are: the share near a training example, and the share of unseen answer words."""
    held_out = prepared.eval[:COMPARED_ROWS]
    near, unseen = _near_share(prepared.train, held_out), _unseen_words(prepared, held_out, decode)
    return {"rows": len(held_out), "near": near, "unseen_words": unseen}


def _near_share(train: Sequence[Example], held_out: Sequence[Example]) -> float:
    """The share of held-out examples with NEAR of their n-grams in one training example.

    N-grams in more than half of the training examples come from the template and are not counted.
    """
    held_out_ngrams = [ngrams(example) for example in held_out]
    candidates = set().union(*held_out_ngrams)
    index: dict[bytes, list[int]] = {}
    for number, example in enumerate(train):
        for ngram in ngrams(example) & candidates:
            index.setdefault(ngram, []).append(number)
    template = {ngram for ngram, numbers in index.items() if len(numbers) > len(train) / 2}
    near = 0
    for ngrams_of_example in held_out_ngrams:
        content = ngrams_of_example - template
        shared = Counter(number for ngram in content for number in index.get(ngram, ()))
        near += bool(content) and shared.total() > 0 and shared.most_common(1)[0][1] >= NEAR * len(content)
    return near / len(held_out)


def ngrams(example: Example) -> set[bytes]:
    """All NGRAM consecutive tokens of an example; a shorter example is one n-gram."""
    ids = example.input_ids
    return {ids[start : start + NGRAM].tobytes() for start in range(max(1, len(ids) - NGRAM + 1))}


def _unseen_words(prepared: Prepared, held_out: Sequence[Example], decode: Callable[[Any], str]) -> float:
    """The share of the words in held-out answers that are neither in their prompt nor in any training answer."""
    seen: set[str] = set()
    for example in prepared.train:
        seen |= _words(decode(example.input_ids[example.labels != IGNORED]))
    unseen = total = 0
    for example in held_out:
        words = _words(decode(example.input_ids[example.labels != IGNORED]))
        total += len(words)
        unseen += len(words - seen - _words(decode(example.input_ids[example.labels == IGNORED])))
    return unseen / total if total else 0.0


def _words(text: str) -> set[str]:
    return {word.lower() for word in WORD.findall(CONTROL.sub(" ", text))}


def measure_few_shot(recipe: Recipe, prepared: Prepared, rows: int, log: Log) -> dict[str, Any]:
    """The base model's loss on held-out examples, zero-shot and few-shot: what a prompt alone achieves.

    In-context examples as in Brown et al. 2020, arXiv:2005.14165. Both losses are over the same examples: those that
    fit into the model's context together with the shots.
    """
    context = context_length(recipe.model.name, recipe.model.revision)
    shots = choose_shots(prepared.train, context // 2)
    context -= sum(map(len, shots))
    fitting = [example for example in prepared.eval if len(example) <= context] if shots else prepared.eval
    held_out = list(fitting[:rows])
    base = load_base(recipe, Single().device, plan_if_known(recipe), log)
    sets = [held_out, [append_to_shots(shots, example) for example in held_out]] if shots else [held_out]
    evaluations = [evaluate(TokenLoss(base.model), examples, recipe.train.micro_batch, Single()) for examples in sets]
    losses = [evaluation.loss for evaluation in evaluations if evaluation]
    return {
        "rows": len(held_out),
        "shots": len(shots),
        "loss": losses[0],
        "few_shot_loss": losses[1] if shots else None,
    }


def choose_shots(train: Sequence[Example], limit: int) -> list[Example]:
    """The first training examples that together have at most `limit` tokens, at most SHOTS of them."""
    shots: list[Example] = []
    for example in train[: 16 * SHOTS]:
        if len(shots) < SHOTS and sum(map(len, shots)) + len(example) <= limit:
            shots.append(example)
    return shots


def append_to_shots(shots: Sequence[Example], example: Example) -> Example:
    """The shots and `example` as one document; only the tokens of `example` bear loss."""
    ids = np.concatenate([*(shot.input_ids for shot in shots), example.input_ids])
    ignored = np.full(len(ids) - len(example), IGNORED, dtype=example.labels.dtype)
    labels = np.concatenate([ignored, example.labels])
    return Example(example.where, ids, labels)
