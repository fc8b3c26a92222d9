"""What a run or a model answers: how well it does on held-out rows, and what it says to a prompt."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora.adapters.switch import AdapterSwitch, adapters_off
from qlora.model.generate_tokens import BATCH_ROWS, generate
from qlora.data.reading.readers import read_jsonl
from qlora.data.formats.messages import conversation
from qlora.data.types import TEXT, BadRecord, Example, Message, Record
from qlora.distributed.single import Single
from qlora.errors import DataError, InputError, did_you_mean
from qlora.utils.progress import ProgressReporter
from qlora.runs.load_run import LoadedRun, Say, held_out
from qlora.training.multiple_choice import MultipleChoice, choice_of, choice_share
from qlora.training.eval_loss import evaluate
from qlora.training.loss import TokenLoss
from qlora.training.exact_match import exact_match, question, text_of
from qlora.runs.full_model import ADAPTERLESS

TASKS = ("loss", "exact-match", "choice")
GENERAL = Path(__file__).parent / "general.txt"  # what a model should not unlearn, whatever it is trained on


def measure(
    opened: LoadedRun, data: str | None, task: str, beside_base: bool = False, say: Say = lambda line: None
) -> dict[str, Any]:
    """What `qlora eval` answers: loss and perplexity always, the task's score where it has one.

    With `beside_base` the base alone as well, and the loss of both on a general text: what was forgotten.
    """
    if task not in TASKS:
        raise InputError(f"--task: no {task!r}.{did_you_mean(task, TASKS)}")
    if beside_base and opened.adapter is None:
        if opened.recipe.adapter.kind == "full":
            raise InputError(f"--beside-base: {ADAPTERLESS} Measure the base with `qlora eval BASE --data ...`.")
        raise InputError("--beside-base: this is a model without an adapter; it is its own base.")
    examples = held_out(opened, data)
    choices = [choice_of(each, opened.base.tokenizer) for each in examples] if task == "choice" else []
    found = {"task": task, **_measured(opened, examples, task, choices, say)}
    if beside_base:
        text = _general(opened)
        tuned = _measured(opened, text, "loss", [], say)
        with adapters_off(opened.base.model):
            found["base"] = _measured(opened, examples, task, choices, say)
            base = _measured(opened, text, "loss", [], say)
        found["forgetting"] = {"base_loss": base["loss"], "loss": tuned["loss"], "tokens": tuned["tokens"]}
    return found


def _measured(
    opened: LoadedRun, examples: Sequence[Example], task: str, choices: Sequence[MultipleChoice], say: Say
) -> dict[str, Any]:
    micro_batch = opened.recipe.train.micro_batch
    told = ProgressReporter(say, "evaluating")
    found = evaluate(TokenLoss(opened.base.model), examples, micro_batch, Single(), progress=told)
    assert found is not None  # nobody gave up
    score = None
    if task == "exact-match":
        score = exact_match_share(opened, examples)
    elif task == "choice":
        score = choice_share(opened.base.model, choices, micro_batch, opened.base.device)
    perplexity = found.perplexity if math.isfinite(found.perplexity) else None
    return {
        "loss": found.loss, "perplexity": perplexity, "score": score, "rows": found.rows, "tokens": found.tokens,
    }  # fmt: skip


def _general(opened: LoadedRun) -> list[Example]:
    """The general text, a row a paragraph, every token of it scored: plain text, as no template wrote it."""
    paragraphs = GENERAL.read_text(encoding="utf-8").strip().split("\n\n")
    encode = opened.encoder.encode
    return [encode(f"general text:{row}", [Message(TEXT, words)]) for row, words in enumerate(paragraphs, 1)]


def exact_match_share(opened: LoadedRun, examples: Sequence[Example]) -> float:
    """The share of rows whose greedy answer is the reference."""
    rows = answers(opened, examples)
    return sum(exact_match(row["answer"], row["reference"]) for row in rows) / max(1, len(rows))


def answers(opened: LoadedRun, examples: Sequence[Example]) -> list[dict[str, str]]:
    """For each row the greedy answer beside the reference."""
    asked = [question(example, opened.base.tokenizer) for example in examples]
    longest = max(
        (len(example) - len(each.prompt_ids) for example, each in zip(examples, asked, strict=True)), default=1
    )
    found = generate(opened.base, [each.prompt_ids for each in asked], max_new_tokens=max(64, 2 * longest))
    return [
        {
            "where": each.where,
            "prompt": text_of(each.prompt_ids, opened.base.tokenizer),
            "reference": each.reference,
            "answer": text_of(ids, opened.base.tokenizer),
        }
        for each, ids in zip(asked, found, strict=True)
    ]


def answer_prompts(opened: LoadedRun, prompt: str, max_new_tokens: int, temperature: float) -> list[dict[str, Any]]:
    """What `qlora generate` answers: a row per prompt, ids in and out."""
    return answer_messages(opened, read_prompts(prompt), max_new_tokens, temperature)


def answer_messages(
    opened: LoadedRun, asked: Sequence[tuple[str, list[Message]]], max_new_tokens: int, temperature: float
) -> list[dict[str, Any]]:
    """For each prompt, as shown and as messages, a row: prompt, input_ids, output_ids, text."""
    encoded = [opened.encoder.prompt_ids(messages) for _, messages in asked]
    found = generate(opened.base, encoded, max_new_tokens, temperature, opened.recipe.train.seed)
    return [
        {"prompt": shown, "input_ids": ids, "output_ids": new, "text": text_of(new, opened.base.tokenizer)}
        for (shown, _), ids, new in zip(asked, encoded, found, strict=True)
    ]


def answer_with_each(
    opened: LoadedRun, switch: AdapterSwitch, prompt: str, max_new_tokens: int, temperature: float
) -> list[dict[str, Any]]:
    """What `qlora generate` answers with several adapters: for each prompt a row per adapter, all in shared batches."""
    asked = [(shown, opened.encoder.prompt_ids(messages)) for shown, messages in read_prompts(prompt)]
    jobs = [(name, shown, ids) for shown, ids in asked for name in switch.names]
    # Sorted by length here, so that `generate` keeps the rows of a batch in the order in which adapters are named.
    order = sorted(range(len(jobs)), key=lambda job: len(jobs[job][2]))
    rows: dict[int, dict[str, Any]] = {}
    for start in range(0, len(order), BATCH_ROWS):
        batch = order[start : start + BATCH_ROWS]
        with switch.rows([jobs[job][0] for job in batch]):
            prompts = [jobs[job][2] for job in batch]
            found = generate(opened.base, prompts, max_new_tokens, temperature, opened.recipe.train.seed)
        for job, new in zip(batch, found, strict=True):
            name, shown, ids = jobs[job]
            text = text_of(new, opened.base.tokenizer)
            rows[job] = {"adapter": name, "prompt": shown, "input_ids": ids, "output_ids": new, "text": text}
    return [rows[job] for job in range(len(jobs))]


def read_prompts(prompt: str) -> list[tuple[str, list[Message]]]:
    """Prompts as shown and as messages: a text, `-` for stdin, or a JSONL file with `prompt` or `messages` a line."""
    if prompt == "-":
        return [_asked(sys.stdin.read().strip())]
    if prompt.endswith(".jsonl"):
        if not Path(prompt).is_file():
            raise DataError(f"{prompt}: no such file. Give a text, a JSONL file, or - for stdin.")
        return [_from_line(row) for row in read_jsonl(Path(prompt), prompt)]
    return [_asked(prompt)]


def _asked(text: str) -> tuple[str, list[Message]]:
    return text, [Message("user", text)]


def _from_line(row: Record | BadRecord) -> tuple[str, list[Message]]:
    if isinstance(row, BadRecord):
        raise DataError(f"{row.where}: {row.message}")
    if isinstance(row.fields.get("prompt"), str):
        return _asked(row.fields["prompt"])
    if "messages" in row.fields:
        messages = conversation(row.fields["messages"], "messages")
        return "\n".join(f"{message.role}: {message.content}" for message in messages), messages
    raise DataError(
        f"{row.where}: has {', '.join(row.fields) or 'nothing'}; a line needs `prompt` (a text) or `messages`."
    )
