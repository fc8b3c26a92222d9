"""In generated conversations, under every template: the assistant's words and ends are trained, and nothing else.

What should be trained is said here a second time, from the conversation alone, and never asked of the encoder.
"""

import random
from dataclasses import dataclass

import pytest
from support.tokenizers import ENDS, FAMILIES, tokenizer_of

from qlora.data.conversations.encoder import Encoder
from qlora.data.types import IGNORED, Message, RecordError

SYSTEM = {"gemma": False}  # templates of the fixtures that refuse a system turn
TOOLS = {"qwen3"}  # that write tools
EACH_FAMILY = pytest.mark.parametrize(("template", "kind"), FAMILIES, ids=lambda value: value)
LETTERS = "abcdefgh 12,.?!\n<|>[]/é😀漢字ß_#\t'\"\\{}%"
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


@dataclass
class ChatSession:
    """A conversation, and for each of its turns whether the assistant is asked to say just that."""

    messages: list[Message]
    train_on: str

    @property
    def turns(self) -> list[Message]:
        return [message for message in self.messages if message.role != "tools"]


def words(draw: random.Random) -> str:
    while not (text := "".join(draw.choice(LETTERS) for _ in range(draw.randrange(1, 24)))).strip():
        pass
    return text


def talk_of(draw: random.Random, template: str) -> ChatSession:
    """A system turn or none, one to four questions, answers by way of a tool now and then, some not to be trained."""
    messages: list[Message] = []
    with_tools = template in TOOLS and draw.random() < 0.4
    if with_tools:
        messages.append(Message("tools", "", extra={"tools": [{"name": "weather", "description": words(draw)}]}))
    if draw.random() < 0.4 and SYSTEM.get(template, True):
        messages.append(Message("system", words(draw)))
    for _ in range(draw.randrange(1, 5)):
        messages.append(Message("user", words(draw)))
        if with_tools and draw.random() < 0.5:
            messages.append(Message("assistant", "", train_of(draw), {"tool_calls": [CALL]}))
            messages.append(Message("tool", words(draw)))
        thought = "<think>\nhm\n</think>\n\n" if template == "qwen3" and draw.random() < 0.3 else ""
        messages.append(Message("assistant", thought + words(draw), train_of(draw)))
    return ChatSession(messages, draw.choice(["assistant", "last", "all"]))


def train_of(draw: random.Random) -> bool | None:
    return draw.choice([None, None, None, None, True, False])


def wanted(talk: ChatSession) -> list[Message]:
    """The answers that the conversation and train_on ask to train."""
    answers = [message for message in talk.turns if message.role == "assistant"]
    chosen = answers[-1:] if talk.train_on == "last" else answers
    return [m for m in answers if m.train is not False and (m.train or any(m is one for one in chosen))]


def kept(talk: ChatSession, template: str) -> list[Message]:
    """Those of them whose prompt stays as it was: Qwen3 rewrites every answer before the last question, and after it
    those that hold no thought and are not the last.
    """
    if template != "qwen3":
        return wanted(talk)
    turns = talk.turns
    question = max(i for i, turn in enumerate(turns) if turn.role == "user")
    sound = [
        turn for i, turn in enumerate(turns) if i > question and (i == len(turns) - 1 or "</think>" in turn.content)
    ]
    return [turn for turn in wanted(talk) if any(turn is one for one in sound)]


def said(message: Message, template: str) -> str:
    """What the model must produce for one answer, its end token included, spacing aside."""
    text = message.content
    if template == "qwen3" and "</think>" not in text:
        text = f"<think></think>{text}"
    if message.extra.get("tool_calls"):
        text += '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
    return squashed(text) + ENDS[template]


def squashed(text: str) -> str:
    return "".join(text.split())


def runs_of(encoder: Encoder, example) -> list[str]:
    """The text of each unbroken stretch of trained tokens."""
    runs, held = [], []
    for token, label in zip([*example.input_ids, -1], [*example.labels, IGNORED], strict=True):
        if label != IGNORED:
            held.append(int(token))
        elif held:
            runs.append(squashed(encoder.decode(held)))
            held = []
    return runs


def mismatch(encoder: Encoder, talk: ChatSession, template: str) -> str:
    """Empty if the row is as it should be; what is wrong otherwise."""
    made = encoder.encode_all([("here:1", talk.messages)])[0]
    if talk.train_on == "all":
        if isinstance(made, RecordError):
            return "" if "drops part" in str(made) else str(made)
        return "" if (made.example.labels == made.example.input_ids).all() else "train_on: all leaves tokens out"
    expected = [said(message, template) for message in kept(talk, template)]
    if isinstance(made, RecordError):
        return "" if not expected and made.reason in ("nothing to train", "prefix not kept") else str(made)
    if made.skipped != len(wanted(talk)) - len(expected):
        return f"{made.skipped} skipped"
    if made.unknown:  # a small unigram vocabulary has no piece for some characters
        return "" if len(runs_of(encoder, made.example)) == len(expected) else "other stretches"
    found = runs_of(encoder, made.example)
    return "" if found == expected else f"{found} is trained, not {expected}"


def check(template: str, kind: str, count: int) -> None:
    encoders = {on: Encoder(tokenizer_of(kind, template), on) for on in ("assistant", "last", "all")}
    draw, trained = random.Random(f"{template} {kind}"), 0
    for number in range(count):
        talk = talk_of(draw, template)
        found = mismatch(encoders[talk.train_on], talk, template)
        assert not found, f"conversation {number}, train_on {talk.train_on}: {found}\n{talk.messages}"
        trained += bool(kept(talk, template))
    assert trained > count / 2  # most of them have something to train


@EACH_FAMILY
def test_what_is_trained_is_what_the_assistant_says(template, kind):
    check(template, kind, 100)


@pytest.mark.slow
@EACH_FAMILY
def test_what_is_trained_is_what_the_assistant_says_two_thousand_times(template, kind):
    check(template, kind, 2_000)


@pytest.mark.parametrize("template", ["gemma"])
def test_a_template_without_system_turns_refuses_every_row_that_has_one(template):
    encoder, draw = Encoder(tokenizer_of("gemma_like", template)), random.Random(0)
    for _ in range(50):
        talk = talk_of(draw, template)
        made = encoder.encode_all([("x:1", [Message("system", words(draw)), *talk.messages])])[0]
        assert isinstance(made, RecordError) and made.reason == "refused by the chat template"
