"""A chat template translated to Ollama's template language (Go's text/template), verified on conversations.

A Jinja template is a program; Ollama needs the text before and after each message. Probe conversations reveal it, and
the translation must then render every probe exactly as the Jinja template does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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
    default_system: str

    def render(self, turns: Sequence[Turn]) -> str:
        """A conversation as the Modelfile's template renders it."""
        roles = {"system": self.system or ("", ""), "user": self.user, "assistant": self.assistant}
        if self.default_system and turns[0]["role"] != "system":
            turns = [{"role": "system", "content": self.default_system}, *turns]
        messages = [f"{roles[turn['role']][0]}{turn['content']}{roles[turn['role']][1]}" for turn in turns]
        return "".join(messages) + self.generation_prompt


@dataclass(frozen=True)
class GoTemplate:
    """TEMPLATE and SYSTEM of a Modelfile."""

    text: str
    system: str


def translate(template: Template) -> GoTemplate:
    """The template in Ollama's language, without the beginning-of-text token, which Ollama adds.

    Untranslatable, with the reason, if the two would render one of the probes differently.
    """
    affixes = _find_affixes(template)
    for turns in _probes(affixes.system is not None):
        expected, rendered = _render(template, turns, True), affixes.render(turns)
        if expected != rendered:
            raise Untranslatable(
                f"the chat template does more than put text around messages ({_first_difference(expected, rendered)})"
            )
    texts = [*(affixes.system or ()), *affixes.user, *affixes.assistant]
    if any('"""' in text for text in (*texts, affixes.generation_prompt, affixes.default_system)):
        raise Untranslatable('the chat template has """ in it')
    roles = {"system": affixes.system, "user": affixes.user, "assistant": affixes.assistant}
    branches = [
        f'if eq .Role "{role}" }}}}{_escape(sides[0])}{{{{ .Content }}}}{_escape(sides[1])}'
        for role, sides in roles.items()
        if sides
    ]
    chain = "{{ " + "{{ else ".join(branches) + "{{ end }}"
    text = "{{ range .Messages }}" + chain + "{{ end }}" + _escape(affixes.generation_prompt)
    return GoTemplate(text, affixes.default_system)


def _find_affixes(template: Template) -> MessageAffixes:
    """The affixes that the rendered probes reveal."""
    question = _render(template, [_turn("user", USER_1)], False)
    prompt = _render(template, [_turn("user", USER_1)], True)
    if not prompt.startswith(question):
        raise Untranslatable("the chat template renders a question differently when an answer is to be generated")
    start, user_after = _split(question, USER_1)
    conversation = [_turn("user", USER_1), _turn("assistant", ANSWER_1), _turn("user", USER_2)]
    _, between, before_user_2, _ = _split(_render(template, conversation, False), USER_1, ANSWER_1, USER_2)
    # Text before a first and before a later question ends in the user's prefix; the rest of the latter ends an answer.
    user_before = _common_end(start, before_user_2)
    assistant = (between.removeprefix(user_after), before_user_2.removesuffix(user_before))
    opening = start.removesuffix(user_before)
    system = _system_affixes(template, user_before)
    default_system = ""
    if opening:
        if system is None or not (opening.startswith(system[0]) and opening.endswith(system[1])):
            raise Untranslatable(f"the chat template begins with {opening[:40]!r}")
        default_system = opening[len(system[0]) : len(opening) - len(system[1])]
    return MessageAffixes(system, (user_before, user_after), assistant, prompt[len(question) :], default_system)


def _system_affixes(template: Template, user_before: str) -> tuple[str, str] | None:
    try:
        text = _render(template, [_turn("system", SYSTEM), _turn("user", USER_1)], False)
    except (RecordError, Untranslatable):
        return None
    if SYSTEM not in text:
        return None
    before, after, _ = _split(text, SYSTEM, USER_1)
    return before, after.removesuffix(user_before)


def _probes(with_system: bool) -> list[list[Turn]]:
    contents = (USER_1, ANSWER_1, USER_2, ANSWER_2, USER_3)
    turns = [_turn("assistant" if number % 2 else "user", content) for number, content in enumerate(contents)]
    probes = [turns[:1], turns[:3], turns]
    return [*probes, *([[_turn("system", SYSTEM), *probe] for probe in probes] if with_system else [])]


def _render(template: Template, turns: Sequence[Turn], prompt: bool) -> str:
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


def _common_end(one: str, other: str) -> str:
    same = next((at for at in range(min(len(one), len(other))) if one[-1 - at] != other[-1 - at]), None)
    return one[len(one) - (min(len(one), len(other)) if same is None else same) :]


def _turn(role: str, content: str) -> Turn:
    return {"role": role, "content": content}


def _escape(text: str) -> str:
    """Text that Go's template engine prints unchanged."""
    return text.replace("{{", '{{ "{{" }}')


def _first_difference(one: str, other: str) -> str:
    same = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return f"{one[same:][:30]!r} against {other[same:][:30]!r}"
