"""Empty think blocks bear no loss, and arguments reach the template, under the chat templates of released models."""

import json
from pathlib import Path
from typing import Any

import pytest
from data.test_real_templates import EACH_TEMPLATE, FOLDER
from support.tokenizers import make_tokenizer
from transformers import PreTrainedTokenizerFast

from qlora.data import Data
from qlora.data.conversations.chat_template import TemplateOptions
from qlora.data.conversations.encoder import Encoder
from qlora.data.types import IGNORED, Message, RecordError
from qlora.errors import DataError, InputError
from qlora.recipe.recipe import from_mapping

QWEN3 = "qwen3"
CONVERSATION = [
    Message("user", "How many moons has Mars?"), Message("assistant", "Two moons."),
    Message("user", "And Earth?"), Message("assistant", "One moon."),
]  # fmt: skip


def encoder_of(name: str, **options: Any) -> Encoder:
    backend = make_tokenizer("bytes", "chatml").backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", bos_token="<s>", unk_token="<unk>", pad_token="<pad>"
    )
    tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return Encoder(tokenizer, options=TemplateOptions(**options))


def trained_text(encoder: Encoder, messages: list[Message]) -> str:
    example = encoder.encode("x:1", messages)
    return encoder.decode(example.labels[example.labels != IGNORED])


@EACH_TEMPLATE
def test_no_answer_without_thoughts_trains_a_think_block(name: str) -> None:
    encoder = encoder_of(name)
    for messages in (CONVERSATION[:2], CONVERSATION):
        try:
            text = trained_text(encoder, messages)
        except RecordError:  # a template that refuses the conversation; other tests name them
            continue
        assert ("think" not in text and "One moon." in text) or (len(messages) == 2 and "Two moons." in text)


@EACH_TEMPLATE
def test_with_train_the_text_is_what_the_template_writes(name: str) -> None:
    """The two settings differ by the block alone, and only where the template writes one."""
    texts = []
    for masks in (True, False):
        try:
            texts.append(trained_text(encoder_of(name, masks_empty_thinking=masks), CONVERSATION[:2]))
        except RecordError:
            return
    masked, whole = texts
    assert whole.endswith(masked)
    assert whole.removesuffix(masked).split() in ([], ["<think>", "</think>"], ["<think></think>"], ["</think>"])


def test_qwen3_writes_an_empty_block_and_it_is_masked() -> None:
    messages = CONVERSATION[:2]
    assert trained_text(encoder_of(QWEN3), messages).startswith("Two moons.")
    assert trained_text(encoder_of(QWEN3, masks_empty_thinking=False), messages).startswith("<think>\n\n</think>")


def test_a_thought_of_the_record_is_trained() -> None:
    messages = [CONVERSATION[0], Message("assistant", "<think>\nMars: Phobos, Deimos.\n</think>\n\nTwo moons.")]
    assert trained_text(encoder_of(QWEN3), messages).startswith("<think>\nMars: Phobos, Deimos.\n</think>")


def test_template_args_reach_the_prompt_and_the_training_text() -> None:
    """With enable_thinking=false the prompt has the empty block: the answer follows it, as in the example."""
    plain, without = encoder_of(QWEN3), encoder_of(QWEN3, args={"enable_thinking": False})
    prompts = [encoder.decode(encoder.prompt_ids(CONVERSATION[:1])) for encoder in (plain, without)]
    assert prompts[0].endswith("assistant\n") and prompts[1].endswith("<think>\n\n</think>\n\n")
    example = without.encode("x:1", CONVERSATION[:2])
    first = int((example.labels != IGNORED).argmax())
    assert without.decode(example.input_ids[:first]) == prompts[1]
    assert plain.sha256 != without.sha256 != encoder_of(QWEN3, masks_empty_thinking=False).sha256


def test_an_argument_that_the_template_does_not_read_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.template_args: .*does not read 'enable_thinkin'"):
        encoder_of(QWEN3, args={"enable_thinkin": False})


@pytest.mark.parametrize("name", ["tools", "messages", "add_generation_prompt"])
def test_an_argument_that_comes_from_the_record_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=rf"'{name}' is set by qlora"):
        from_mapping({"model": "x", "data": {"train": "y", "template_args": {name: True}}})


def test_the_settings_are_read_from_yaml_and_the_command_line(tmp_path: Path) -> None:
    recipe = from_mapping(
        {"model": "x", "data": {"train": "y", "template_args": {"enable_thinking": False}}},
        overrides=["data.empty_thinking=train", "data.template_args={reasoning_effort: high}"],
    )[0]
    assert recipe.data.empty_thinking == "train" and dict(recipe.data.template_args) == {"reasoning_effort": "high"}
    assert Data(train="y").template_args == {} and json.dumps(recipe.data.template_args)
