"""Generate answers to prompts: from a run, or from several adapters on one base model in shared batches."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora.adapters.switch import AdapterSwitch
from qlora.data.formats.messages import parse_messages
from qlora.data.reading.readers import read_jsonl
from qlora.data.types import BadRecord, Message, Record
from qlora.errors import DataError
from qlora.model.generate_tokens import BATCH_SIZE, generate
from qlora.runs.load_run import LoadedRun
from qlora.training.exact_match import text_of

Prompt = tuple[str, list[Message]]  # as shown to the user, and as messages


def generate_from_prompts(run: LoadedRun, prompt: str, max_new_tokens: int, temperature: float) -> list[dict[str, Any]]:
    """The rows of `qlora generate`: one per prompt, with token ids in and out."""
    return generate_from_messages(run, read_prompts(prompt), max_new_tokens, temperature)


def generate_from_messages(
    run: LoadedRun, prompts: Sequence[Prompt], max_new_tokens: int, temperature: float
) -> list[dict[str, Any]]:
    """For each prompt a row: prompt, input_ids, output_ids, text."""
    inputs = [run.encoder.prompt_ids(messages) for _, messages in prompts]
    outputs = generate(run.base, inputs, max_new_tokens, temperature, run.recipe.train.seed)
    return [
        {"prompt": shown, "input_ids": ids, "output_ids": new_ids, "text": text_of(new_ids, run.base.tokenizer)}
        for (shown, _), ids, new_ids in zip(prompts, inputs, outputs, strict=True)
    ]


def generate_with_adapters(
    run: LoadedRun, switch: AdapterSwitch, prompt: str, max_new_tokens: int, temperature: float
) -> list[dict[str, Any]]:
    """The rows of `qlora generate` with several adapters: for each prompt a row per adapter, in shared batches."""
    inputs = [(shown, run.encoder.prompt_ids(messages)) for shown, messages in read_prompts(prompt)]
    jobs = [(name, shown, ids) for shown, ids in inputs for name in switch.names]
    # Sorted by length here, so that `generate` keeps the order in which the rows of a batch name their adapters.
    order = sorted(range(len(jobs)), key=lambda job: len(jobs[job][2]))
    rows: dict[int, dict[str, Any]] = {}
    for start in range(0, len(order), BATCH_SIZE):
        batch = order[start : start + BATCH_SIZE]
        with switch.per_row([jobs[job][0] for job in batch]):
            prompts = [jobs[job][2] for job in batch]
            outputs = generate(run.base, prompts, max_new_tokens, temperature, run.recipe.train.seed)
        for job, new_ids in zip(batch, outputs, strict=True):
            name, shown, ids = jobs[job]
            text = text_of(new_ids, run.base.tokenizer)
            rows[job] = {"adapter": name, "prompt": shown, "input_ids": ids, "output_ids": new_ids, "text": text}
    return [rows[job] for job in range(len(jobs))]


def read_prompts(prompt: str) -> list[Prompt]:
    """The prompts of a text, of stdin (`-`), or of a JSONL file with `prompt` or `messages` in each line."""
    if prompt == "-":
        return [_user_prompt(sys.stdin.read().strip())]
    if prompt.endswith(".jsonl"):
        if not Path(prompt).is_file():
            raise DataError(f"{prompt}: no such file. Give a text, a JSONL file, or - for stdin.")
        return [_prompt_of_record(record) for record in read_jsonl(Path(prompt), prompt)]
    return [_user_prompt(prompt)]


def _user_prompt(text: str) -> Prompt:
    return text, [Message("user", text)]


def _prompt_of_record(record: Record | BadRecord) -> Prompt:
    if isinstance(record, BadRecord):
        raise DataError(f"{record.where}: {record.message}")
    if isinstance(record.fields.get("prompt"), str):
        return _user_prompt(record.fields["prompt"])
    if "messages" in record.fields:
        messages = parse_messages(record.fields["messages"], "messages")
        return "\n".join(f"{message.role}: {message.content}" for message in messages), messages
    fields = ", ".join(record.fields) or "no fields"
    raise DataError(f"{record.where}: found {fields}; a line needs `prompt` (a text) or `messages`.")
