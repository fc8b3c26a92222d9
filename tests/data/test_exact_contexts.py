"""Contexts have the ids of the whole prompt, also where the tokenizer joins an answer with the text around it."""

import random

import numpy as np
import pytest
from support.tokenizers import make_tokenizer, without_whitespace

from qlora.data.conversations import path_tokens
from qlora.data.conversations.encoder import Encoder
from qlora.data.conversations.text_paths import PathBuilder, Stretch, common_chars
from qlora.data.prefix_tree import paths_of
from qlora.data.types import IGNORED, Message, RecordError

PROMPT = "{% if add_generation_prompt %}{{ 'Bot:' + gap }}{% endif %}"
CLOSED_BY_TEXT = (  # no control token before an answer, and none that closes one
    "{% for m in messages %}{{ ('Bot:' if m.role == 'assistant' else 'Man:') + gap + m.content + '\n\n' }}{% endfor %}"
)
STRIPS_PAST = (  # an answer is shortened as soon as another turn follows
    "{% for m in messages %}{{ ('Bot:' if m.role == 'assistant' else 'Man:') + gap }}"
    "{{ (m.content if loop.last or m.role == 'user' else m.content[:3]) + '</s>' }}{% endfor %}"
)
CONTENTS = ["\n\nYes.", "  two spaces", "\nand a line\n", "the dog", "1 2", "\n", "é😀", "...", "a\n\n", " \n x"]


def encoder_of(kind: str, template: str, gap: str, folder: pytest.TempPathFactory) -> Encoder:
    path = folder.mktemp("templates") / "template.jinja"
    path.write_text("{% set gap = " + repr(gap) + " %}" + template + PROMPT, encoding="utf-8")
    return Encoder(make_tokenizer(kind), "assistant", str(path))


@pytest.mark.sample(of=4, every=("kind", "template"))
@pytest.mark.parametrize("kind", ["bytes", "bytes_bos", "pieces", "pieces_first", "gemma_like"])
@pytest.mark.parametrize("template", [CLOSED_BY_TEXT, STRIPS_PAST], ids=["closed by text", "strips the past"])
@pytest.mark.parametrize("gap", [" ", "\n", "\n\n", ""], ids=repr)
def test_contexts_are_prompts_and_answers_what_follows(
    kind: str, template: str, gap: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    encoder, tokenizer = encoder_of(kind, template, gap, tmp_path_factory), make_tokenizer(kind)
    draw = random.Random(f"{kind} {gap}")
    for _ in range(4):
        turns = [Message(("user", "assistant")[i % 2], draw.choice(CONTENTS) + f"{i}") for i in range(6)]
        paths = paths_of(encoder.encode("x:1", turns))
        for index in (1, 3, 5):
            shown = [{"role": m.role, "content": m.content} for m in turns[: index + 1]]
            prompt = tokenizer(encoder.template.render(shown[:-1], prompt=True), add_special_tokens=False)["input_ids"]
            prompt = [*([tokenizer.bos_token_id] if encoder.tokenizer.adds_bos else []), *prompt]
            assert encoder.prompt_ids(turns[:index]) == prompt
            path = next(path for path in paths if starts_an_answer(path, prompt))
            answer = path.input_ids[len(prompt) :][: int((path.labels[len(prompt) :] != IGNORED).cumprod().sum())]
            assert without_whitespace(encoder.decode(answer)).startswith(without_whitespace(turns[index].content))


def starts_an_answer(path: object, prompt: list[int]) -> bool:
    ids, labels = path.input_ids, path.labels  # type: ignore[attr-defined]
    return (
        ids[: len(prompt)].tolist() == prompt and labels[len(prompt)] != IGNORED and labels[len(prompt) - 1] == IGNORED
    )


def test_proving_contexts_without_control_tokens_is_bounded(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(path_tokens, "_MOST_CHARS", 2_000)
    encoder = encoder_of("bytes", CLOSED_BY_TEXT, " ", tmp_path_factory)
    turns = [Message(("user", "assistant")[i % 2], f"word {i}") for i in range(40)]
    result = encoder.encode_batch([("x:1", turns)])[0]
    assert isinstance(result, RecordError) and result.reason == "takes too long to tokenize"
    assert encoder.encode("x:1", turns[:4]).trained_tokens()


def test_answers_share_a_rendering_where_it_has_them_unchanged() -> None:
    builder = PathBuilder("P1 A1 P2 A2")
    assert builder.place("P1 A1 P2 A2", Stretch(9, 9, 11), True) and builder.place("P1 A1", Stretch(3, 3, 5), True)
    assert builder.place("P1 B1", Stretch(3, 3, 5), True)
    assert not builder.place("P1 C1", Stretch(3, 3, 5, trained=False), True)
    full, own = builder.paths(keep_full=False)
    assert [(s.start, s.end) for s in full.stretches] == [(3, 5), (9, 11)] and own.text == "P1 B1" and own.shared == 3


def test_the_common_beginning_of_two_texts() -> None:
    draw = random.Random(0)
    for _ in range(200):
        first, second = ("".join(draw.choice("ab") for _ in range(draw.randrange(9))) for _ in range(2))
        expected = next((i for i, (x, y) in enumerate(zip(first, second, strict=False)) if x != y), None)
        assert common_chars(first, second) == (min(len(first), len(second)) if expected is None else expected)


def test_a_path_is_the_same_whether_it_shares_the_one_before_it_or_not() -> None:
    """The ids of a branch are those of its whole text."""
    encoder, tokenizer = Encoder(make_tokenizer("bytes", "qwen3")), make_tokenizer("bytes", "qwen3")
    turns = [Message(("user", "assistant")[i % 2], f"the dog {i}\n") for i in range(8)]
    turns[3] = Message("assistant", "<|im_end|> broken", extra={"thinking": "hm <|im_start|>"})
    for path in paths_of(encoder.encode("x:1", turns)):
        text = encoder.decode(path.input_ids)
        assert (path.labels != IGNORED).any() and text.startswith("<|im_start|>user\nthe dog 0")
        if "broken" not in text:
            assert np.array_equal(tokenizer(text, add_special_tokens=False)["input_ids"], path.input_ids)
