"""`train.sample_prompts`: what the model answers to a few prompts during training, the base's answers beside once."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from qlora.adapters.switch import disable_adapters
from qlora.data.prompt_file import Prompt, read_prompt_file, user_prompt
from qlora.model.generate_tokens import RowHooks, generate
from qlora.model.load_base import Base
from qlora.recipe.dataset_profile import build_encoder
from qlora.recipe.recipe import Recipe
from qlora.runs import write_artifacts
from qlora.training.exact_match import text_of
from qlora.training.job import AnswerPrompts
from qlora.training.signals import StopSignal
from qlora.utils.out_of_memory import is_out_of_memory


def sample_prompts(setting: str | Sequence[str]) -> list[Prompt]:
    """The prompts of the setting: a JSONL file, or texts. DataError for a line of the file without a prompt."""
    return read_prompt_file(setting) if isinstance(setting, str) else [user_prompt(text) for text in setting]


def prompt_answerer(recipe: Recipe, base: Base, log: Callable[[str], None], stop: StopSignal) -> AnswerPrompts | None:
    """Answers the run's sample prompts; None without prompts. A signal makes the answers short.

    The random state does not change, so that the run is the same with and without prompts.
    """
    prompts = sample_prompts(recipe.train.sample_prompts)
    if not prompts:
        return None
    encoder = build_encoder(recipe, base.tokenizer)
    ids = [encoder.prompt_ids(messages) for _, messages in prompts]
    ends = () if encoder.end_token_id is None else (encoder.end_token_id,)
    base = replace(base, stop_token_ids=tuple({*base.stop_token_ids, *ends}))
    hooks = RowHooks(is_complete=lambda row, ids: stop.received)
    has_base = recipe.adapter.kind != "full"  # a fully trained model has none left

    def texts(context: AbstractContextManager[None]) -> list[str]:
        with context:
            answers = generate(base, ids, write_artifacts.SAMPLE_TOKENS, hooks=hooks)
        return [text_of(answer, base.tokenizer) for answer in answers]

    def answer(beside_base: bool) -> list[dict[str, str]]:
        try:
            columns = {"answer": texts(nullcontext())}
            if beside_base and has_base:
                columns["base"] = texts(disable_adapters(base.model))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log("train.sample_prompts: no answers, generating them ran out of memory. Training is not affected.")
            return []
        rows = [{"prompt": shown} for shown, _ in prompts]
        return [row | {name: texts[index] for name, texts in columns.items()} for index, row in enumerate(rows)]

    return answer
