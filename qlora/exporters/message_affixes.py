"""The texts that a chat template puts around messages, which probe conversations reveal.

A Jinja template is a program; what it does to plain conversations is mostly text before and after each message. What is
revealed must then render every probe exactly as the template does.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from qlora.data.conversations.chat_template import Template, Turn
from qlora.data.types import RecordError

# Contents of the probes' messages, which are searched in the rendered text: system, then user and assistant in turn.
SYSTEM, USER_1, ANSWER_1, USER_2, ANSWER_2, USER_3 = (
    "sentinelsys", "sentinelone", "sentinelans", "sentineltwo", "sentinelrep", "sentinelend",
)  # fmt: skip


class Untranslatable(Exception):
    """The template does more than put text around each message."""


@dataclass(frozen=True)
class MessageAffixes:
    """The text before and after a message of each role, and the generation prompt."""

    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    generation_prompt: str
    default_system: str = ""
    opening: str = ""  # before a conversation without a system message
    in_user: bool = False  # the system message is inside the first question, before its content

    def render(self, turns: Sequence[Turn]) -> str:
        """A conversation as the Modelfile's template renders it."""
        if self.default_system and turns[0]["role"] != "system":
            turns = [message("system", self.default_system), *turns]
        roles = {"system": self.system or ("", ""), "user": self.user, "assistant": self.assistant}
        texts, inside = [] if turns[0]["role"] == "system" else [self.opening], ""
        for turn in turns:
            (before, after), content = roles[turn["role"]], turn["content"]
            if self.in_user and turn["role"] == "system":
                inside = f"{before}{content}{after}"
            else:
                texts.append(f"{before}{inside}{content}{after}")
                inside = ""
        return "".join(texts) + self.generation_prompt


def find_affixes(template: Template) -> MessageAffixes:
    """The affixes that the rendered probes reveal, and that render every probe."""
    problem = Untranslatable("the chat template does more than put text around messages")
    for affixes in _candidates(template):
        problem_of_candidate = _find_difference(template, affixes)
        if problem_of_candidate is None:
            return affixes
        problem = problem_of_candidate
    raise problem


def _find_difference(template: Template, affixes: MessageAffixes) -> Untranslatable | None:
    for turns in probes(affixes.system is not None):
        expected, rendered = render_text(template, turns, True), affixes.render(turns)
        if expected != rendered:
            return Untranslatable(
                f"the chat template does more than put text around messages ({_first_difference(expected, rendered)})"
            )
    return None


def _candidates(template: Template) -> Iterator[MessageAffixes]:
    """Affixes with the system message as a message of its own, then with it inside the first question."""
    prompt = render_text(template, [message("user", USER_1)], True)
    start, end = _split(prompt, USER_1)
    conversation = [message("user", USER_1), message("assistant", ANSWER_1), message("user", USER_2)]
    _, between, before_user_2, _ = _split(render_text(template, conversation, False), USER_1, ANSWER_1, USER_2)
    # Text before a first and before a later question ends in the user's prefix; the rest of the latter ends an answer.
    user_before = _common_end(start, before_user_2)
    # What follows a question, whether an answer or the generation prompt comes next; not the end of a whole text.
    question = render_text(template, [message("user", USER_1)], False).removeprefix(start + USER_1)
    user_after = question if end.startswith(question) else _common_start(end, between)
    assistant = (between.removeprefix(user_after), before_user_2.removesuffix(user_before))
    opening, user = start.removesuffix(user_before), (user_before, user_after)
    common = MessageAffixes(None, user, assistant, end.removeprefix(user_after), opening=opening)
    system = _system_texts(template)
    if system is None:
        yield common
        return
    before, after = system
    if after.endswith(user_before):
        yield _with_default_system(replace(common, system=(before, after.removesuffix(user_before))))
    if before.startswith(user_before):
        yield replace(common, system=(before.removeprefix(user_before), after), in_user=True)


def _with_default_system(affixes: MessageAffixes) -> MessageAffixes:
    """An opening that is a system message, as the content of one that a user can replace."""
    before, after = affixes.system or ("", "")
    opening = affixes.opening
    content = opening[len(before) : len(opening) - len(after)]
    is_message = opening == f"{before}{content}{after}" and content
    return replace(affixes, default_system=content, opening="") if is_message else affixes


def _system_texts(template: Template) -> tuple[str, str] | None:
    """The text before a system message, and the text between it and the first question; None if it is refused."""
    try:
        text = render_text(template, [message("system", SYSTEM), message("user", USER_1)], False)
    except (RecordError, Untranslatable):
        return None
    if SYSTEM not in text:
        return None
    before, after, _ = _split(text, SYSTEM, USER_1)
    return before, after


def probes(with_system: bool) -> list[list[Turn]]:
    """Conversations of 1, 3 and 5 messages, then the same after a system message."""
    contents = (USER_1, ANSWER_1, USER_2, ANSWER_2, USER_3)
    turns = [message("assistant" if number % 2 else "user", content) for number, content in enumerate(contents)]
    plain = [turns[:1], turns[:3], turns]
    return [*plain, *([[message("system", SYSTEM), *probe] for probe in plain] if with_system else [])]


def render_text(template: Template, turns: Sequence[Turn], prompt: bool) -> str:
    """What the template makes of a conversation, without the beginning-of-text token. Untranslatable if it refuses."""
    try:
        return template.render(turns, prompt=prompt).removeprefix(template.bos)
    except RecordError as error:
        raise Untranslatable(f"the chat template refuses a plain conversation: {error}") from error


def _split(text: str, *sentinels: str) -> list[str]:
    """The text between the sentinels, which must each occur once, in order."""
    texts = []
    for sentinel in sentinels:
        before, separator, text = text.partition(sentinel)
        if not separator:
            raise Untranslatable("the chat template changes the content of a message")
        texts.append(before)
    return [*texts, text]


def _common_start(one: str, other: str) -> str:
    return _common_end(one[::-1], other[::-1])[::-1]


def _common_end(one: str, other: str) -> str:
    same = next((at for at in range(min(len(one), len(other))) if one[-1 - at] != other[-1 - at]), None)
    return one[len(one) - (min(len(one), len(other)) if same is None else same) :]


def message(role: str, content: str) -> Turn:
    """A turn of a conversation."""
    return {"role": role, "content": content}


def _first_difference(one: str, other: str) -> str:
    same = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return f"{one[same:][:30]!r} against {other[same:][:30]!r}"
