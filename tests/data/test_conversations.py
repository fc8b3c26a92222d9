"""Generated conversations, with every template: the answers and their end tokens are trained, nothing else.

The expected trained text is derived here from the conversation alone, independently of the encoder.
"""

import random
from dataclasses import dataclass

import numpy as np
import pytest
from support.tokenizers import END_TOKENS, FAMILIES, make_tokenizer, without_whitespace

from qlora.data.conversations.build_example import Encoded
from qlora.data.conversations.chat_template import TemplateOptions
from qlora.data.conversations.encoder import Encoder
from qlora.data.conversations.roles import SYSTEM_MERGED
from qlora.data.prefix_tree import paths_of
from qlora.data.types import IGNORED, Example, Message, RecordError

REFUSES_SYSTEM = {"gemma"}  # templates that refuse a system turn
WRITES_TOOLS = {"qwen3"}  # templates that write tools
EACH_FAMILY = pytest.mark.parametrize(("template", "kind"), FAMILIES, ids=lambda value: value)
CHARACTERS = "abcdefgh 12,.?!\n<|>[]/é😀漢字ß_#\t'\"\\{}%"
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


@dataclass
class Dialog:
    """The messages of a record, and data.train_on."""

    messages: list[Message]
    train_on: str

    @property
    def turns(self) -> list[Message]:
        return [message for message in self.messages if message.role != "tools"]


def words(draw: random.Random) -> str:
    while not (text := "".join(draw.choice(CHARACTERS) for _ in range(draw.randrange(1, 24)))).strip():
        pass
    return text


def make_dialog(draw: random.Random, template: str) -> Dialog:
    """A system turn or none, one to four questions, some answers with a tool call, some answers not to be trained."""
    messages: list[Message] = []
    with_tools = template in WRITES_TOOLS and draw.random() < 0.4
    if with_tools:
        messages.append(Message("tools", "", extra={"tools": [{"name": "weather", "description": words(draw)}]}))
    if draw.random() < 0.4 and template not in REFUSES_SYSTEM:
        messages.append(Message("system", words(draw)))
    for _ in range(draw.randrange(1, 5)):
        messages.append(Message("user", words(draw)))
        if with_tools and draw.random() < 0.5:
            messages.append(Message("assistant", "", draw_train(draw), {"tool_calls": [CALL]}))
            messages.append(Message("tool", words(draw)))
        thought = "<think>\nhm\n</think>\n\n" if template == "qwen3" and draw.random() < 0.3 else ""
        messages.append(Message("assistant", thought + words(draw), draw_train(draw)))
    return Dialog(messages, draw.choice(["assistant", "last", "all"]))


def draw_train(draw: random.Random) -> bool | None:
    return draw.choice([None, None, None, None, True, False])


def selected_answers(dialog: Dialog) -> list[Message]:
    """The answers that train_on and the messages' own `train` select."""
    answers = [message for message in dialog.turns if message.role == "assistant"]
    by_default = answers[-1:] if dialog.train_on == "last" else answers
    return [m for m in answers if m.train is not False and (m.train or any(m is other for other in by_default))]


def expected_text(message: Message, template: str) -> str:
    """What the model must generate for one answer, end token included, without whitespace."""
    text = message.content
    if template == "qwen3" and "</think>" not in text:
        text = f"<think></think>{text}"
    if message.extra.get("tool_calls"):
        text += '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
    return without_whitespace(text) + END_TOKENS[template]


def trained_runs(encoder: Encoder, example: Example) -> list[str]:
    """The text of each run of consecutive trained tokens of each path, without whitespace."""
    runs, run = list[str](), list[int]()
    for path in paths_of(example):
        for token, label in zip([*path.input_ids, -1], [*path.labels, IGNORED], strict=True):
            if label != IGNORED:
                run.append(int(token))
            elif run:
                runs.append(without_whitespace(encoder.decode(run)))
                run = []
    return sorted(runs)


def mismatch(encoder: Encoder, dialog: Dialog, template: str) -> str:
    """Empty if the right tokens are trained; the difference otherwise."""
    encoded = encoder.encode_batch([("x:1", dialog.messages)])[0]
    if dialog.train_on == "all":
        return mismatch_of_all(encoder, encoded, dialog, template)
    expected = sorted(expected_text(message, template) for message in selected_answers(dialog))
    if isinstance(encoded, RecordError):
        return "" if not expected and encoded.reason in ("nothing to train", "prefix not kept") else str(encoded)
    if encoded.untrained_answers:
        return f"{encoded.untrained_answers} untrained answers"
    runs = trained_runs(encoder, encoded.example)
    if encoded.unknown_tokens:  # a small unigram vocabulary has no piece for some characters
        return "" if len(runs) == len(expected) else "a different number of runs"
    return "" if runs == expected else f"{runs} is trained, not {expected}"


def mismatch_of_all(encoder: Encoder, encoded: Encoded | RecordError, dialog: Dialog, template: str) -> str:
    """With train_on: all, every token is trained but those of masked answers; a rewritten one can't be masked.

    The branches of rewritten answers have contexts that are not trained.
    """
    masked = [message for message in dialog.turns if message.train is False]
    if isinstance(encoded, RecordError):
        fine = "drops part" in str(encoded) or (masked and template == "qwen3" and "not applied" in encoded.reason)
        return "" if fine else str(encoded)
    example = encoded.example
    if example.branches:
        return "" if template == "qwen3" else "a branch"
    untrained = without_whitespace(encoder.decode(example.input_ids[example.labels == IGNORED]))
    expected = "".join(expected_text(message, template) for message in masked)
    return "" if untrained == expected or "<unk>" in untrained else f"{untrained} is untrained, not {expected}"


def check(template: str, kind: str, count: int) -> None:
    options = TemplateOptions(masks_empty_thinking=False)  # the law without an exception
    tokenizer = make_tokenizer(kind, template)
    encoders = {on: Encoder(tokenizer, on, options=options) for on in ("assistant", "last", "all")}
    draw, trained = random.Random(f"{template} {kind}"), 0
    for number in range(count):
        dialog = make_dialog(draw, template)
        difference = mismatch(encoders[dialog.train_on], dialog, template)
        assert not difference, f"conversation {number}, train_on {dialog.train_on}: {difference}\n{dialog.messages}"
        trained += bool(selected_answers(dialog))
    assert trained > count / 2  # most dialogs have an answer to train


@pytest.mark.sample(of=4)
@EACH_FAMILY
def test_the_answers_of_a_hundred_dialogs_are_trained(template: str, kind: str) -> None:
    check(template, kind, 100)


@pytest.mark.slow
@EACH_FAMILY
def test_the_answers_of_two_thousand_dialogs_are_trained(template: str, kind: str) -> None:
    check(template, kind, 2_000)


@pytest.mark.parametrize("template", ["gemma"])
def test_a_strict_template_gets_a_system_turn_in_the_first_question(template: str) -> None:
    encoder, draw = Encoder(make_tokenizer("gemma_like", template)), random.Random(0)
    for _ in range(50):
        dialog, system = make_dialog(draw, template), words(draw)
        first, *rest = dialog.messages
        joined = Message("user", f"{system}\n\n{first.content}")
        result, expected = encoder.encode_batch([
            ("x:1", [Message("system", system), first, *rest]), ("x:1", [joined, *rest])])  # fmt: skip
        if isinstance(result, Encoded) and isinstance(expected, Encoded):
            assert result.answers.merges == (SYSTEM_MERGED,) and expected.answers.merges == ()
            assert np.array_equal(result.example.input_ids, expected.example.input_ids)
            assert np.array_equal(result.example.labels, expected.example.labels)
        else:
            assert "nothing to train" in str(result) and str(result) == str(expected)
