"""The chat template as a server needs it: what training gave the template beside the conversation is in its text.

A server renders the template without qlora's arguments and adds no token of its own. So the arguments of training and
its pinned date become defaults, and the beginning-of-text token is written by the template where training puts one.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qlora.data.conversations.encoder import Encoder
from qlora.exporters.served_conversations import ServedConversation, fixed_probes, ids_of_server

BOS_FORMS = ("{{ bos_token }}", "{{ bos_token + ' ' }}")  # the latter where the tokenizer puts a space before a text


def served_templates(encoder: Encoder, tokenizer: Any) -> dict[str, str]:
    """The templates of training by transformers' names for them, `default` among them, as a server needs them.

    Templates of the tokenizer that training does not use are kept beside its own, but not beside another one.
    """
    own = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {"default": tokenizer.chat_template}
    trained = encoder.named_templates
    is_own = trained["default"].text == own.get("default")
    others = {name: text for name, text in own.items() if name not in trained and is_own}
    probes = fixed_probes(encoder)
    served = {
        name: _served(with_default_arguments(template.pinned_text, template.variables), encoder, tokenizer, probes)
        for name, template in trained.items()
    }
    return others | served


def with_default_arguments(template: str, values: Mapping[str, Any]) -> str:
    """The template, in which variables that a server does not pass have the values of training."""
    # The empty expression at the end keeps a line end with which the template begins.
    lines = [
        f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}{{{{ '' }}}}"
        for name, value in values.items()
    ]
    return "".join(lines) + template


def _served(text: str, encoder: Encoder, tokenizer: Any, probes: Sequence[ServedConversation]) -> str:
    """The text; with the beginning-of-text token before it where only that gives the ids of training."""
    if not encoder.tokenizer.adds_bos:
        return text
    forms = [text, *(form + text for form in BOS_FORMS)]

    def equal(form: str) -> int:
        return sum(ids_of_server(tokenizer, probe, form) == probe.ids for probe in probes if not probe.tools)

    return max(forms, key=equal)  # the first of equally good ones


def _literal(value: Any) -> str:
    """A value as Jinja writes it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(str(key))}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
