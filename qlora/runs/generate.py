"""Generate answers to prompts: from a run, or from several adapters on one base model in shared batches."""

from collections.abc import Sequence
from typing import Any

from qlora.adapters.switch import AdapterSwitch
from qlora.model.generate_tokens import BATCH_SIZE, generate
from qlora.runs.load_run import LoadedRun
from qlora.runs.prompts import Prompt
from qlora.training.exact_match import text_of


def generate_from_prompts(
    run: LoadedRun, prompts: Sequence[Prompt], max_new_tokens: int, temperature: float
) -> list[dict[str, Any]]:
    """The rows of `qlora generate`, one per prompt: prompt, input_ids, output_ids, text."""
    inputs = [run.encoder.prompt_ids(messages) for _, messages in prompts]
    outputs = generate(run.base, inputs, max_new_tokens, temperature, run.recipe.train.seed)
    return [
        {"prompt": shown, "input_ids": ids, "output_ids": new_ids, "text": text_of(new_ids, run.base.tokenizer)}
        for (shown, _), ids, new_ids in zip(prompts, inputs, outputs, strict=True)
    ]


def generate_with_adapters(
    run: LoadedRun, switch: AdapterSwitch, prompts: Sequence[Prompt], max_new_tokens: int, temperature: float
) -> list[dict[str, Any]]:
    """The rows of `qlora generate` with several adapters: for each prompt a row per adapter, in shared batches.

    Adapters of experts have batches of their own.
    """
    inputs = [(shown, run.encoder.prompt_ids(messages)) for shown, messages in prompts]
    jobs = [(name, shown, ids) for shown, ids in inputs for name in switch.names]
    # Sorted by length here, so that `generate` keeps the order in which the rows of a batch name their adapters.
    order = sorted(range(len(jobs)), key=lambda job: len(jobs[job][2]))
    shared = [order] if switch.mixes_rows else [[job for job in order if jobs[job][0] == name] for name in switch.names]
    rows: dict[int, dict[str, Any]] = {}
    for batch in (group[start : start + BATCH_SIZE] for group in shared for start in range(0, len(group), BATCH_SIZE)):
        with switch.per_row([jobs[job][0] for job in batch]):
            batch_ids = [jobs[job][2] for job in batch]
            outputs = generate(run.base, batch_ids, max_new_tokens, temperature, run.recipe.train.seed)
        for job, new_ids in zip(batch, outputs, strict=True):
            name, shown, ids = jobs[job]
            text = text_of(new_ids, run.base.tokenizer)
            rows[job] = {"adapter": name, "prompt": shown, "input_ids": ids, "output_ids": new_ids, "text": text}
    return [rows[job] for job in range(len(jobs))]
