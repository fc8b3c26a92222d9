"""What a run or a model answers: how well it does on held-out rows, and what it says to a prompt."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora.base.generate import generate
from qlora.data.files import read_jsonl
from qlora.data.formats.messages import conversation
from qlora.data.types import BadRow, Example, Message, Row
from qlora.distributed.single import Single
from qlora.errors import DataError, InputError, NotBuiltYet, did_you_mean
from qlora.reopen import Opened, held_out
from qlora.train.evaluate import evaluate
from qlora.train.loss import TokenLoss
from qlora.train.tasks import exact_match, question, text_of

TASKS = ("loss", "exact-match", "choice")


def measure(opened: Opened, data: str | None, task: str) -> dict[str, Any]:
    """What `qlora eval` answers: loss and perplexity always, the task's score where it has one."""
    if task not in ("loss", "exact-match"):
        if task == "choice":
            raise NotBuiltYet("--task choice is not built yet. Use loss or exact-match.")
        raise InputError(f"--task: no {task!r}.{did_you_mean(task, TASKS)}")
    examples = held_out(opened, data)
    micro_batch = opened.recipe.train.micro_batch
    found = evaluate(TokenLoss(opened.base.model), examples, micro_batch, Single())
    assert found is not None  # nobody gave up
    score = exact_match_share(opened, examples) if task == "exact-match" else None
    perplexity = found.perplexity if math.isfinite(found.perplexity) else None
    return {
        "task": task, "loss": found.loss, "perplexity": perplexity, "score": score,
        "rows": found.rows, "tokens": found.tokens,
    }  # fmt: skip


def exact_match_share(opened: Opened, examples: Sequence[Example]) -> float:
    """The share of rows whose greedy answer is the reference."""
    rows = answers(opened, examples)
    return sum(exact_match(row["answer"], row["reference"]) for row in rows) / max(1, len(rows))


def answers(opened: Opened, examples: Sequence[Example]) -> list[dict[str, str]]:
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


def answer_prompts(opened: Opened, prompt: str, max_new_tokens: int, temperature: float) -> list[dict[str, Any]]:
    """What `qlora generate` answers: a row per prompt, ids in and out."""
    asked = read_prompts(prompt)
    encoded = [opened.encoder.prompt_ids(messages) for _, messages in asked]
    found = generate(opened.base, encoded, max_new_tokens, temperature, opened.recipe.train.seed)
    return [
        {"prompt": shown, "input_ids": ids, "output_ids": new, "text": text_of(new, opened.base.tokenizer)}
        for (shown, _), ids, new in zip(asked, encoded, found, strict=True)
    ]


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


def _from_line(row: Row | BadRow) -> tuple[str, list[Message]]:
    if isinstance(row, BadRow):
        raise DataError(f"{row.where}: {row.message}")
    if isinstance(row.fields.get("prompt"), str):
        return _asked(row.fields["prompt"])
    if "messages" in row.fields:
        messages = conversation(row.fields["messages"], "messages")
        return "\n".join(f"{message.role}: {message.content}" for message in messages), messages
    raise DataError(
        f"{row.where}: has {', '.join(row.fields) or 'nothing'}; a line needs `prompt` (a text) or `messages`."
    )
