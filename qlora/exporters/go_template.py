"""A chat template said in the language of Ollama's Modelfile (Go's text/template), proved on conversations.

A Jinja template is a program; what Ollama needs is what stands around each message. Probe conversations tell it, and
the template made of it must then write every probe exactly as the Jinja template does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from qlora.data.conversations.chat_template import Template, Turn
from qlora.data.types import RecordError

S, U, A, V, B, W = "sentinelsys", "sentinelone", "sentinelans", "sentineltwo", "sentinelrep", "sentinelend"


class Untranslatable(Exception):
    """The template does more than put something around each message."""


@dataclass(frozen=True)
class Around:
    """What stands before and after the words of each role, and what asks for the next answer."""

    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    asks: str
    default_system: str

    def write(self, turns: Sequence[Turn]) -> str:
        """A conversation as the Modelfile's template writes it."""
        roles = {"system": self.system or ("", ""), "user": self.user, "assistant": self.assistant}
        if self.default_system and turns[0]["role"] != "system":
            turns = [{"role": "system", "content": self.default_system}, *turns]
        parts = [f"{roles[turn['role']][0]}{turn['content']}{roles[turn['role']][1]}" for turn in turns]
        return "".join(parts) + self.asks


@dataclass(frozen=True)
class GoTemplate:
    """TEMPLATE and SYSTEM of a Modelfile."""

    text: str
    system: str


def translate(template: Template) -> GoTemplate:
    """The template in Ollama's language; the beginning-of-text token is left out, since Ollama puts it.

    Untranslatable, with the reason, if the two would write one of the probes differently.
    """
    around = _around(template)
    for turns in _probes(around.system is not None):
        wanted, found = _rendered(template, turns, True), around.write(turns)
        if wanted != found:
            raise Untranslatable(
                f"the chat template does more than put words around messages ({_apart(wanted, found)})"
            )
    texts = [*(around.system or ()), *around.user, *around.assistant, around.asks, around.default_system]
    if any('"""' in text for text in texts):
        raise Untranslatable('the chat template has """ in it')
    roles = {"system": around.system, "user": around.user, "assistant": around.assistant}
    branches = [
        f'if eq .Role "{role}" }}}}{_literal(sides[0])}{{{{ .Content }}}}{_literal(sides[1])}'
        for role, sides in roles.items()
        if sides
    ]
    chain = "{{ " + "{{ else ".join(branches) + "{{ end }}"
    return GoTemplate("{{ range .Messages }}" + chain + "{{ end }}" + _literal(around.asks), around.default_system)


def _around(template: Template) -> Around:
    """What the probes show; each message's words are a sentinel that is found again in the text."""
    one = _rendered(template, [_turn("user", U)], False)
    asked = _rendered(template, [_turn("user", U)], True)
    if not asked.startswith(one):
        raise Untranslatable("the chat template writes a question otherwise when an answer is asked for")
    head, user_after = _split(one, U)
    asks = asked[len(one) :]
    longer = _rendered(template, [_turn("user", U), _turn("assistant", A), _turn("user", V)], False)
    _, between, again, _ = _split(longer, U, A, V)
    # Where a question may stand first or later, what always stands before it is its own; the rest closes the answer.
    user_before = _common_end(head, again)
    assistant = (between.removeprefix(user_after), again.removesuffix(user_before))
    opening = head.removesuffix(user_before)
    system = _system(template, user_before)
    default = ""
    if opening:
        if system is None or not (opening.startswith(system[0]) and opening.endswith(system[1])):
            raise Untranslatable(f"the chat template begins with {opening[:40]!r}")
        default = opening[len(system[0]) : len(opening) - len(system[1])]
    return Around(system, (user_before, user_after), assistant, asks, default)


def _system(template: Template, user_before: str) -> tuple[str, str] | None:
    try:
        told = _rendered(template, [_turn("system", S), _turn("user", U)], False)
    except (RecordError, Untranslatable):
        return None
    if S not in told:
        return None
    before, after, _ = _split(told, S, U)
    return before, after.removesuffix(user_before)


def _probes(with_system: bool) -> list[list[Turn]]:
    talk = [_turn("user", U), _turn("assistant", A), _turn("user", V), _turn("assistant", B), _turn("user", W)]
    plain = [talk[:1], talk[:3], talk]
    return [*plain, *([[_turn("system", S), *turns] for turns in plain] if with_system else [])]


def _rendered(template: Template, turns: Sequence[Turn], prompt: bool) -> str:
    try:
        return template.render(turns, prompt=prompt).removeprefix(template.bos)
    except RecordError as error:
        raise Untranslatable(f"the chat template refuses a plain conversation: {error}") from error


def _split(text: str, *sentinels: str) -> list[str]:
    """The text between the sentinels, which must each be there once, in order."""
    parts = []
    for sentinel in sentinels:
        before, found, text = text.partition(sentinel)
        if not found:
            raise Untranslatable("the chat template changes what a message says")
        parts.append(before)
    return [*parts, text]


def _common_end(one: str, other: str) -> str:
    same = next((at for at in range(min(len(one), len(other))) if one[-1 - at] != other[-1 - at]), None)
    return one[len(one) - (min(len(one), len(other)) if same is None else same) :]


def _turn(role: str, content: str) -> Turn:
    return {"role": role, "content": content}


def _literal(text: str) -> str:
    """Text that Go's template engine prints as it is."""
    return text.replace("{{", '{{ "{{" }}')


def _apart(one: str, other: str) -> str:
    same = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return f"{one[same:][:30]!r} against {other[same:][:30]!r}"
