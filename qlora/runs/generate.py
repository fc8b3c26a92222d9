"""Generate answers to prompts: from a run, or from several adapters on one base model in shared batches."""

from collections.abc import Sequence
from typing import Any

from qlora.adapters.switch import AdapterSwitch
from qlora.data.prompt_file import Prompt
from qlora.model.generate_tokens import RowHooks, generate
from qlora.runs.inference_memory import inference_memory
from qlora.runs.load_run import LoadedRun
from qlora.training.exact_match import text_of


def generate_from_prompts(
    run: LoadedRun, prompts: Sequence[Prompt], max_new_tokens: int, temperature: float
) -> list[dict[str, Any]]:
    """The rows of `qlora generate`, one per prompt: prompt, input_ids, output_ids, text."""
    inputs = [run.encoder.prompt_ids(messages) for _, messages in prompts]
    with inference_memory(run.base):
        outputs = generate(run.base, inputs, max_new_tokens, temperature, run.recipe.train.seed)
    return [
        {"prompt": shown, "input_ids": ids, "output_ids": new_ids, "text": text_of(new_ids, run.base.tokenizer)}
        for (shown, _), ids, new_ids in zip(prompts, inputs, outputs, strict=True)
    ]


def generate_with_adapters(
    run: LoadedRun, switch: AdapterSwitch, prompts: Sequence[Prompt], max_new_tokens: int, temperature: float
) -> list[dict[str, Any]]:
    """The rows of `qlora generate` with several adapters: for each prompt a row per adapter, in shared batches."""
    inputs = [(shown, run.encoder.prompt_ids(messages)) for shown, messages in prompts]
    jobs = [(name, shown, ids) for shown, ids in inputs for name in switch.names]
    names = [name for name, _, _ in jobs]
    with switch.per_row(names) as rows, inference_memory(run.base):
        hooks = RowHooks(select=rows.select, groups=names)
        ids = [ids for _, _, ids in jobs]
        outputs = generate(run.base, ids, max_new_tokens, temperature, run.recipe.train.seed, hooks)
    texts = [text_of(new_ids, run.base.tokenizer) for new_ids in outputs]
    return [
        {"adapter": name, "prompt": shown, "input_ids": ids, "output_ids": new_ids, "text": text}
        for (name, shown, ids), new_ids, text in zip(jobs, outputs, texts, strict=True)
    ]
