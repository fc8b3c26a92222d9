"""The chat template: which one is used, and conversations rendered with it under a size limit."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qlora.data.conversations.compiled_template import CompiledTemplate, compile_template
from qlora.data.types import RecordError
from qlora.errors import DataError, first_line

Turn = Mapping[str, Any]  # a message as the template reads it: {role, content, tool_calls, ...}

# For tokenizers without a template. The end token closes an answer, so that the model learns to stop.
PLAIN = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '### Assistant:\\n' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] }}"
    "{% else %}{{ '### ' + message['role'].capitalize() + ':\\n' + message['content'] }}{% endif %}"
    "{% if not loop.last %}{{ '\\n\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\n### Assistant:\\n' }}{% endif %}"
)

_FREE_CHARS = 2**20  # for headers, tool schemas and system prompts that a template adds to a conversation
_MAX_GROWTH = 64  # rendered characters per input character
_MARKS = re.compile(r"\{%-?\s*generation\b")
TOOL_TEMPLATE = "tool_use"
_SAMPLE_TOOL = {  # for samples that are rendered with a template for tools
    "type": "function",
    "function": {
        "name": "judge",
        "description": "Judge a vow.",
        "parameters": {"type": "object", "properties": {"vow": {"type": "string", "description": "the vow"}}},
    },
}
# With today's date, a run resumed tomorrow would see other tokens. This is Llama-3's default.
_TODAY = datetime(2024, 7, 26)  # a template writes the day alone
_DATE = "26 Jul 2024"
_CURRENT_DATE = re.compile(r"""strftime_now\(\s*(['"])([^'"]*)\1\s*\)""")


def with_pinned_date(template_text: str) -> str:
    """A template whose calls of strftime_now, the current date, give the same day in every run."""
    return _CURRENT_DATE.sub(lambda match: repr(_TODAY.strftime(match[2])), template_text)


@dataclass(frozen=True)
class TemplateOptions:
    """How conversations are rendered and masked: data.template_args, data.thinking and data.empty_thinking."""

    args: Mapping[str, Any] = field(default_factory=dict)
    masks_empty_thinking: bool = True
    thinking: str = "as_template"


class Template:
    """The chat template of `tokenizer`. `name` describes where it is from, `text` is its Jinja source.

    with_tools: the template of conversations with tools, which differs if the tokenizer has one named `tool_use`.
    args: further variables of the template. DataError for one that the template does not read.
    """

    def __init__(
        self,
        tokenizer: Any,
        chat_template: str,
        with_tools: bool = False,
        args: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self._tokenizer = tokenizer
        self.name, self.text = _choose(tokenizer, chat_template, with_tools)
        self._pinned_text = with_pinned_date(self.text)
        self.sample_tools = [_SAMPLE_TOOL] if self.name.endswith(repr(TOOL_TEMPLATE)) else None
        self._variables = ({"date_string": _DATE} if "strftime_now" in self.text else {}) | dict(args)
        unread = next((name for name in args if not re.search(rf"\b{re.escape(name)}\b", self.text)), None)
        if unread is not None:
            raise DataError(f"data.template_args: {self.name} does not read {unread!r}. Correct or remove it.")

    @property
    def bos(self) -> str:
        """The beginning-of-text token as text; empty if the tokenizer has none."""
        return str(self._tokenizer.bos_token or "")

    @property
    def variables(self) -> Mapping[str, Any]:
        """What the template gets beside the conversation: its arguments, and the pinned date."""
        return self._variables

    @property
    def pinned_text(self) -> str:
        """The Jinja source with the date of training in place of the current one."""
        return self._pinned_text

    @property
    def key(self) -> tuple[str, ...]:
        """Everything but the conversation that decides what is rendered."""
        variables = (type(self._tokenizer), self._tokenizer.special_tokens_map, self._variables, self.sample_tools)
        return self.text, *map(repr, variables)

    def render(self, turns: Sequence[Turn], tools: Sequence[Any] | None = None, prompt: bool = False) -> str:
        """The text of a conversation; with `prompt`, followed by the generation prompt. RecordError if refused."""
        text = self._compiled.render(turns, prompt) if self._compiled and tools is None else None
        if text is not None:
            return _limit_size(text, turns, tools)
        try:
            text = self._tokenizer.apply_chat_template(
                turns,
                tools=tools,
                chat_template=self._pinned_text,
                add_generation_prompt=prompt,
                tokenize=False,
                **self._variables,
            )
        except Exception as error:  # a template is a program: it may raise anything
            raise RecordError("refused by the chat template", first_line(error, 200)) from None
        return _limit_size(text, turns, tools)

    @cached_property
    def _compiled(self) -> CompiledTemplate | None:
        return compile_template(self._tokenizer, self._pinned_text, self._variables)

    def marked_text(self, turns: Sequence[Turn]) -> str | None:
        """The text of a conversation that the template's generation marks cover; None if it has none."""
        if not _MARKS.search(self.text):
            return None
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True, **self._variables}
        try:
            encoded = self._tokenizer.apply_chat_template(
                turns, tools=self.sample_tools, chat_template=self._pinned_text, **options
            )
            pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
            return str(self._tokenizer.decode([token for token, flag in pairs if flag]))
        except Exception as error:  # a template is a program: it may raise anything
            raise RecordError("refused by the chat template", first_line(error, 200)) from None


def _choose(tokenizer: Any, chat_template: str, with_tools: bool) -> tuple[str, str]:
    named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if chat_template in named:
        return f"the model's chat template {chat_template!r}", named[chat_template]
    if chat_template != "auto":
        path = Path(chat_template)
        if not path.is_file():
            names = f", or the name of a template of the model: {', '.join(sorted(named))}" if named else ""
            problem = f"model.chat_template: no file {chat_template}. Allowed: auto, or a Jinja file's path{names}."
            raise DataError(problem)
        return f"chat template {chat_template}", _read(path)
    if named:
        return _choose_named(named, with_tools)
    if tokenizer.chat_template:
        return "the model's own chat template", tokenizer.chat_template
    if tokenizer.eos_token is None:
        raise DataError(
            "tokenizer: no chat template and no end token, so a model could not learn to stop. "
            "Name the token in eos_token of tokenizer_config.json, or give model.chat_template=FILE.jinja."
        )
    return "qlora's plain template (the model has none)", PLAIN


def _choose_named(named: Mapping[str, str], with_tools: bool) -> tuple[str, str]:
    """The template that transformers chooses: `tool_use` for conversations with tools, else `default`."""
    name = TOOL_TEMPLATE if with_tools and TOOL_TEMPLATE in named else "default"
    if name not in named:
        raise DataError(
            f"model.chat_template: the model has {len(named)} named chat templates and none is named default: "
            f"{', '.join(sorted(named))}. Name one: model.chat_template={min(named)}, or a Jinja file."
        )
    return f"the model's chat template {name!r}", named[name]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"model.chat_template: {path} can't be read as text: {error}") from None


def _limit_size(text: str, turns: Sequence[Turn], tools: Sequence[Any] | None) -> str:
    """`text`. RecordError if it is far longer than the conversation."""
    if len(text) > _FREE_CHARS:
        input_chars = len(json.dumps([list(turns), tools], default=str))
        if len(text) > _FREE_CHARS + _MAX_GROWTH * input_chars:
            raise RecordError("refused by the chat template", f"it made {len(text)} characters out of {input_chars}")
    return text
