"""The renderer: conversations -> text with a loss mask, by the chat template that fits the conversation."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from qlora.data.conversations import record_limits
from qlora.data.conversations.chat_messages import Conversation
from qlora.data.conversations.chat_template import Template, TemplateOptions
from qlora.data.conversations.generation_marks import differing_marks
from qlora.data.conversations.loss_mask import LossMasker
from qlora.data.conversations.roles import as_system, writes_role
from qlora.data.conversations.safe_tokenizer import SafeTokenizer
from qlora.data.conversations.template_probe import probe
from qlora.data.conversations.text_paths import MaskedText
from qlora.data.conversations.thoughts import ThoughtWriter
from qlora.data.conversations.tool_arguments import with_fitting_arguments
from qlora.data.conversations.unused_parts import UnusedParts
from qlora.data.types import Message, RecordError
from qlora.errors import DataError


class Renderer:
    """One chat template in use, after its probe. DataError for an unusable template."""

    def __init__(self, template: Template, tokenizer: SafeTokenizer, options: TemplateOptions) -> None:
        self.template = template
        self.unused_parts = UnusedParts(template)
        try:  # jinja2 computes constant expressions when it compiles the template, in this process for the first time
            with record_limits.memory(), record_limits.time_limit():
                self._loss_masker = LossMasker(template, tokenizer, options.masks_empty_thinking)
                self.thoughts = ThoughtWriter(template, options.thinking)
        except (RecordError, MemoryError) as error:
            reason = str(error) or "takes too much memory to compile"
            raise DataError(f"{template.name}: {reason}. Give another one with model.chat_template.") from None

    @property
    def end_token(self) -> str:
        """The control token that closes an answer; empty if the template writes none."""
        return self._loss_masker.ending.token

    @property
    def notes(self) -> list[str]:
        """What a user should know about the template before training with it."""
        ending, notes = self._loss_masker.ending, []
        if not ending.token:
            closing = repr(ending.text) if ending.text else "nothing"
            notes.append(f"it closes an answer with {closing}, no token: the end token is added after the last answer")
        if ending.prompt_only_chars:
            notes.append("its prompt differs from its rendered answers: each is trained from where the two differ")
        if ending.trained_header:
            header = repr(ending.trained_header)
            notes.append(f"it has no generation prompt: what it writes before an answer ({header}) is trained with it")
        marks = differing_marks(self.template, self._loss_masker)
        return [*notes, *([marks] if marks else [])]

    def with_known_roles(self, messages: Sequence[Message]) -> tuple[Sequence[Message], tuple[str, ...]]:
        """`messages` in roles that the template writes, and the rules that were applied."""
        if self._writes_developer or not any(message.role == "developer" for message in messages):
            return messages, ()
        return as_system(messages)

    @cached_property
    def _writes_developer(self) -> bool:
        return writes_role(self.template, "developer")

    def render(self, conversation: Conversation, prompt: bool, train_all: bool) -> tuple[Conversation, MaskedText]:
        """The conversation as the template reads it, and what is trained of it. RecordError if it can't be rendered."""
        if conversation.tools and "tools" not in self.template.text:
            detail = f"{len(conversation.tools)} tools would be lost"
            raise RecordError("the template does not write tools", detail)
        fitting = with_fitting_arguments(conversation, self.template, prompt)
        conversation = fitting or conversation
        masked = self._loss_masker.prompt(conversation) if prompt else self._loss_masker.mask(conversation, train_all)
        if fitting is None:
            detail = "a call's arguments are written neither as text nor as an object"
            raise RecordError("the template does not write tool arguments", detail)
        hidden = next((i for i in masked.unlocated if conversation.masked[i]), None)
        if train_all and hidden is not None:
            problem = f"turn {hidden + 1} is masked, and the template rewrites it: its text can't be found"
            raise RecordError("loss mask not applied", f"{problem}. Set data.train_on: assistant")
        return conversation, masked


def build_renderers(
    tokenizer: Any, chat_template: str, options: TemplateOptions
) -> tuple[SafeTokenizer, Renderer, Renderer]:
    """The tokenizer, the renderer of conversations without tools, and that of conversations with tools."""
    templates = [Template(tokenizer, chat_template, with_tools, options.args) for with_tools in (False, True)]
    if templates[0].text == templates[1].text:
        templates = templates[:1]
    for template in templates:
        probe(template)
    safe_tokenizer = SafeTokenizer(tokenizer, "".join(template.text for template in templates))
    renderers: Sequence[Renderer] = [Renderer(template, safe_tokenizer, options) for template in templates]
    return safe_tokenizer, renderers[0], renderers[-1]
