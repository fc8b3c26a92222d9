"""Evaluate a run or a model on held-out examples: loss, perplexity, task score, and forgetting of general text."""

import math
from collections.abc import Sequence
from typing import Any

from qlora.adapters.switch import disable_adapters
from qlora.data.types import Example
from qlora.distributed.single import Single
from qlora.errors import InputError
from qlora.model.generate_tokens import generate
from qlora.runs.artifacts import NO_ADAPTER
from qlora.runs.eval_tasks import require_task
from qlora.runs.evaluate_pairs import evaluate_pairs
from qlora.runs.general_text import general_examples
from qlora.runs.inference_memory import inference_memory
from qlora.runs.load_run import LoadedRun, held_out_examples
from qlora.runs.memory_setup import Log
from qlora.training.eval_loss import evaluate
from qlora.training.exact_match import exact_match, question, text_of
from qlora.training.loss import TokenLoss
from qlora.training.multiple_choice import MultipleChoice, choice_accuracy, choice_of
from qlora.utils.progress import ProgressReporter


def evaluate_run(
    run: LoadedRun, data: str | None, task: str, beside_base: bool = False, log: Log = lambda line: None
) -> dict[str, Any]:
    """The JSON object of `qlora eval`: loss and perplexity, and the score of tasks that have one.

    `beside_base` adds the base model without the adapter, and the loss of both on a general text (forgetting).
    """
    require_task(task)
    if task == "preference":
        return evaluate_pairs(run, data, beside_base, log)
    if beside_base and run.adapter is None:
        if run.recipe.adapter.kind == "full":
            raise InputError(f"--beside-base: {NO_ADAPTER} Evaluate the base with `qlora eval BASE --data ...`.")
        raise InputError("--beside-base: needs an adapter; this is a base model. Leave the option out.")
    examples = held_out_examples(run, data)
    choices = [choice_of(example, run.base.tokenizer) for example in examples] if task == "choice" else []
    result = {"task": task, **_evaluate(run, examples, task, choices, log)}
    if beside_base:
        text = general_examples(run.encoder)
        tuned = _evaluate(run, text, "loss", [], log)
        with disable_adapters(run.base.model):
            result["base"] = _evaluate(run, examples, task, choices, log)
            base = _evaluate(run, text, "loss", [], log)
        result["forgetting"] = {"base_loss": base["loss"], "loss": tuned["loss"], "tokens": tuned["tokens"]}
    return result


def _evaluate(
    run: LoadedRun, examples: Sequence[Example], task: str, choices: Sequence[MultipleChoice], log: Log
) -> dict[str, Any]:
    micro_batch = run.recipe.train.micro_batch
    progress = ProgressReporter(log, "evaluating")
    evaluation = evaluate(TokenLoss(run.base.model), examples, micro_batch, Single(), progress=progress)
    assert evaluation is not None  # only an interrupted evaluation is None
    score = None
    if task == "exact-match":
        score = exact_match_rate(run, examples)
    elif task == "choice":
        score = choice_accuracy(run.base.model, choices, micro_batch, run.base.device)
    return {
        "loss": evaluation.loss,
        "perplexity": evaluation.perplexity if math.isfinite(evaluation.perplexity) else None,
        "score": score,
        "rows": evaluation.rows,
        "tokens": evaluation.tokens,
    }


def exact_match_rate(run: LoadedRun, examples: Sequence[Example]) -> float:
    """The share of examples whose greedy answer is the reference."""
    rows = answer_examples(run, examples)
    return sum(exact_match(row["answer"], row["reference"]) for row in rows) / max(1, len(rows))


def answer_examples(run: LoadedRun, examples: Sequence[Example]) -> list[dict[str, str]]:
    """The greedy answer to each example's prompt, with the reference."""
    questions = [question(example, run.base.tokenizer) for example in examples]
    prompts = [item.prompt_ids for item in questions]
    longest = max((len(example) - len(ids) for example, ids in zip(examples, prompts, strict=True)), default=1)
    with inference_memory(run.base):
        answers = generate(run.base, prompts, max_new_tokens=max(64, 2 * longest))
    return [
        {
            "where": item.where,
            "prompt": text_of(item.prompt_ids, run.base.tokenizer),
            "reference": item.reference,
            "answer": text_of(ids, run.base.tokenizer),
        }
        for item, ids in zip(questions, answers, strict=True)
    ]
