"""A chat template translated to Ollama's template language (Go's text/template), verified on conversations."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from qlora.data.conversations.chat_template import Template, Turn
from qlora.exporters.message_affixes import (
    SYSTEM,
    MessageAffixes,
    Untranslatable,
    find_affixes,
    message,
    probes,
    render_text,
)

# A template may strip them, which Ollama's language can't: a difference that the Modelfile names.
BLANKS = ("  {}", "{}  ", "\n{}", "{}\n\n", " \n{}\t ", "{0}\n\n  {0}")
_TRIMS: Mapping[str, Callable[[str], str]] = {
    "kept": lambda text: text,
    "stripped": str.strip,
    "left": str.lstrip,
    "right": str.rstrip,
    "left lines": lambda text: text.lstrip("\n"),
    "lines": lambda text: text.strip("\n"),
}


@dataclass(frozen=True)
class GoTemplate:
    """TEMPLATE and SYSTEM of a Modelfile."""

    text: str
    system: str
    trimmed: tuple[str, ...] = ()  # roles whose messages lose blanks at their ends in training, which Ollama keeps


def translate(template: Template) -> GoTemplate:
    """The template in Ollama's language, without the beginning-of-text token.

    Untranslatable, with the reason, if the two would render one of the probes differently.
    """
    affixes = find_affixes(template)
    texts = [*(affixes.system or ()), *affixes.user, *affixes.assistant, affixes.opening]
    if any('"""' in text for text in (*texts, affixes.generation_prompt, affixes.default_system)):
        raise Untranslatable('the chat template has """ in it')
    return GoTemplate(_as_go(affixes), affixes.default_system, _trimmed_roles(template, affixes))


def _as_go(affixes: MessageAffixes) -> str:
    system, inside = affixes.system, ""
    if affixes.in_user and system:
        first, last = map(_escape, system)
        inside = f"{{{{ if and $.System (eq $i 1) }}}}{first}{{{{ $.System }}}}{last}{{{{ end }}}}"
    roles = {"system": None if affixes.in_user else system, "user": affixes.user, "assistant": affixes.assistant}
    branches = [
        f'if eq .Role "{role}" }}}}{_escape(sides[0])}{inside if role == "user" else ""}'
        f"{{{{ .Content }}}}{_escape(sides[1])}"
        for role, sides in roles.items()
        if sides
    ]
    chain = "{{ " + "{{ else ".join(branches) + "{{ end }}"
    variables = "$i, $_ := " if inside else ""
    opening = f"{{{{ if not .System }}}}{_escape(affixes.opening)}{{{{ end }}}}" if affixes.opening else ""
    return f"{opening}{{{{ range {variables}.Messages }}}}{chain}{{{{ end }}}}{_escape(affixes.generation_prompt)}"


def _trimmed_roles(template: Template, affixes: MessageAffixes) -> tuple[str, ...]:
    """Roles whose contents lose blanks at their ends. Untranslatable if a content changes in another way."""
    roles = []
    for role in (["system"] if affixes.system else []) + ["user", "assistant"]:
        kept = [*map(str, _TRIMS)]
        for ends in BLANKS:
            turns = [message("system", SYSTEM)] * bool(affixes.system) + probes(False)[-1]
            padded = [message(role, ends.format(turn["content"])) if turn["role"] == role else turn for turn in turns]
            expected = render_text(template, padded, True)
            kept = [name for name in kept if expected == affixes.render(_trim(padded, role, name))]
        if not kept:
            raise Untranslatable(f"the chat template changes blanks or line ends inside a message of the {role}")
        roles += [role] if kept[0] != "kept" else []
    return tuple(roles)


def _trim(turns: Sequence[Turn], role: str, name: str) -> list[Turn]:
    return [message(role, _TRIMS[name](turn["content"])) if turn["role"] == role else turn for turn in turns]


def _escape(text: str) -> str:
    """Text that Go's template engine prints unchanged."""
    return text.replace("{{", '{{ "{{" }}')
