"""The encoder: messages -> examples with verified loss masks, and prompts tokenized the same way."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from qlora.data.conversations import record_limits
from qlora.data.conversations.answer_counts import answer_counts, nothing_to_train
from qlora.data.conversations.build_example import (
    Draft,
    Encoded,
    build_example,
    from_token_record,
    verify_masks,
)
from qlora.data.conversations.chat_messages import Conversation, build_conversation
from qlora.data.conversations.chat_template import TOOL_TEMPLATE, Template, TemplateOptions
from qlora.data.conversations.loss_mask import may_write_thoughts
from qlora.data.conversations.path_tokens import NO_IDS, TokenPaths, path_jobs, token_paths
from qlora.data.conversations.renderer import build_renderers
from qlora.data.conversations.roles import render_in_a_form
from qlora.data.conversations.text_paths import MaskedText, Stretch, TextPath
from qlora.data.types import IGNORED, TEXT, TOKENS, TOOLS, Example, Ints, Message, RecordError

Item = tuple[str, Sequence[Message]]  # where, messages


class Encoder:
    """Tokenizes messages with the chat template of `tokenizer` (a PreTrainedTokenizerFast).

    train_on: assistant (every answer), last (the last answer), all (every token). control_strings: text, or accept (in
    plain text they are control tokens). options: arguments of the template, and whether an empty think block bears
    loss. DataError for an unusable template.
    """

    def __init__(
        self,
        tokenizer: Any,
        train_on: str = "assistant",
        chat_template: str = "auto",
        control_strings: str = "text",
        options: TemplateOptions = TemplateOptions(),  # noqa: B008  # frozen
    ) -> None:
        self.train_on, self._accept, self._options = train_on, control_strings == "accept", options
        self.tokenizer, self._renderer, self._tool_renderer = build_renderers(tokenizer, chat_template, options)
        self.template = self._renderer.template
        self.vocab_size = len(tokenizer)
        self._special = json.dumps([tokenizer.special_tokens_map, self.vocab_size], sort_keys=True, default=str)
        eos = tokenizer.eos_token_id
        end = self._renderer.end_token  # closes an answer in the chat template; empty if it writes no token
        self.end_token_id: int | None = tokenizer.convert_tokens_to_ids(end) if end else None
        self._eos = NO_IDS if eos is None else np.array([eos], dtype=np.int32)

    @cached_property
    def sha256(self) -> str:
        """A digest of all that the token ids depend on: vocabulary, merges, control tokens, templates, train_on."""
        inputs = [self.tokenizer.as_json(), self._special, self.template.text, self.train_on]
        inputs += [self._tool_renderer.template.text] if self._tool_renderer is not self._renderer else []
        inputs += ["accept"] if self._accept else []
        inputs += [json.dumps(dict(self._options.args), sort_keys=True)] if self._options.args else []
        inputs += [self._options.thinking] if self._options.thinking != "as_template" else []
        masks = self._options.masks_empty_thinking and may_write_thoughts(self.template.text)
        inputs += ["empty thinking masked"] if masks else []
        return hashlib.sha256("\0".join(inputs).encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def template_args(self) -> Mapping[str, Any]:
        """The arguments of the template: data.template_args."""
        return self._options.args

    @property
    def thought_closing(self) -> str:
        """What the template writes after a thought; empty if it has no place for thoughts."""
        return self._renderer.thoughts.place.closing

    @property
    def named_templates(self) -> Mapping[str, Template]:
        """The template by the name that transformers gives it, and that of conversations with tools if it differs."""
        tools = {} if self._tool_renderer is self._renderer else {TOOL_TEMPLATE: self._tool_renderer.template}
        return {"default": self.template} | tools

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know about the chat template before training with it."""
        notes = [f"conversations are rendered with {self.template.name}", *self._renderer.notes]
        if self._tool_renderer is not self._renderer:
            name = self._tool_renderer.template.name
            notes += [f"conversations with tools are rendered with {name}", *self._tool_renderer.notes]
        return tuple(notes)

    def encode(self, where: str, messages: Sequence[Message]) -> Example:
        """The example of `messages`. RecordError if they can't be trained on."""
        result = self.encode_batch([(where, messages)])[0]
        if isinstance(result, RecordError):
            raise result
        return result.example

    def encode_batch(self, items: Sequence[Item]) -> list[Encoded | RecordError]:
        """`encode` for many records, which is much faster, with a RecordError for each that can't be used."""
        with record_limits.memory():
            drafts = record_limits.within_time([messages for _, messages in items], self._draft)
        tokens = self._tokenize(drafts)
        valid = [token for token in tokens if isinstance(token, TokenPaths)]
        verified = iter(verify_masks(valid, self.tokenizer))
        return [
            self._finish(item, draft, token, next(verified) if isinstance(token, TokenPaths) else token)
            for item, draft, token in zip(items, drafts, tokens, strict=True)
        ]

    def _tokenize(self, drafts: Sequence[Draft | RecordError]) -> list[TokenPaths | RecordError]:
        """The ids and labels of each draft's paths; a RecordError for one that has none."""
        jobs = [[] if isinstance(draft, RecordError) else path_jobs(draft.paths, self.tokenizer) for draft in drafts]
        chars = ["" if isinstance(draft, RecordError) else draft.break_char for draft in drafts]
        texts = [(job.text, char) for record, char in zip(jobs, chars, strict=True) for job in record]
        ids, results = iter(self.tokenizer.encode_texts(texts)), list[TokenPaths | RecordError]()
        for draft, record, char in zip(drafts, jobs, chars, strict=True):
            own_ids = [next(ids) for _ in record]
            try:
                eos = NO_IDS if isinstance(draft, RecordError) else draft.eos
                tokens = token_paths(record, own_ids, self.tokenizer, char, eos, self.train_on == "all")
                results.append(draft if isinstance(draft, RecordError) else tokens)
            except RecordError as error:
                results.append(error)
        return results

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a prompt: those that training puts before the next answer. RecordError if refused."""
        return self.read_prompt(messages)[0]

    def read_prompt(self, messages: Sequence[Message]) -> tuple[list[int], Conversation | None]:
        """`prompt_ids`, and the conversation as the template read it; None for a plain text."""
        with record_limits.memory():
            draft = record_limits.within_time([messages], self._prompt_draft)[0]
        if isinstance(draft, RecordError):
            raise draft
        tokens = self._tokenize([replace(draft, eos=NO_IDS)])[0]
        if isinstance(tokens, RecordError):
            raise tokens
        ids = np.concatenate([draft.prefix_ids, tokens.paths[0][0]])
        return [int(token) for token in ids], draft.conversation

    def decode(self, ids: Sequence[int] | Ints) -> str:
        """The text of `ids`, control tokens included."""
        return self.tokenizer.decode([np.asarray(ids, dtype=np.int32)])[0]

    def _draft(self, messages: Sequence[Message]) -> Draft | RecordError:
        """The draft of a record; empty for one that is tokenized already."""
        if _is(messages, TOKENS):
            return Draft()
        return self._text(messages[0]) if _is(messages, TEXT) else self._conversation(messages)

    def _prompt_draft(self, messages: Sequence[Message]) -> Draft | RecordError:
        return self._text(messages[0]) if _is(messages, TEXT) else self._conversation(messages, prompt=True)

    def _text(self, message: Message) -> Draft | RecordError:
        """The draft of a plain text: the tokenizer's own tokens before and after it, and the end token."""
        added = (self.tokenizer.prefix_ids, self.tokenizer.suffix_ids)
        prefix_ids, suffix_ids = (np.array(ids, dtype=np.int32) for ids in added)
        if not np.array_equal(suffix_ids[-1:], self._eos):
            suffix_ids = np.concatenate([suffix_ids, self._eos])
        if self._accept:
            text = message.content
            prefix_ids = NO_IDS if self.tokenizer.starts_with_bos(text) else prefix_ids
            suffix_ids = NO_IDS if self.tokenizer.ends_with_special(text.rstrip()) else suffix_ids
            return Draft((_all_trained(text),), prefix_ids=prefix_ids, eos=suffix_ids)
        try:
            (text,), break_char, control_strings = self.tokenizer.break_control_strings([message.content], [True])
        except RecordError as error:
            return error
        path = _all_trained(text)
        return Draft((path,), break_char, control_strings, prefix_ids=prefix_ids, eos=suffix_ids)

    def _conversation(self, messages: Sequence[Message], prompt: bool = False) -> Draft | RecordError:
        try:
            return self._rendered(messages, prompt)
        except RecordError as error:
            return error
        except MemoryError:
            return RecordError("takes too much memory to render")

    def _rendered(self, messages: Sequence[Message], prompt: bool) -> Draft:
        """The draft of a conversation. RecordError if it can't be rendered, or nothing in it is trained."""
        renderer = self._tool_renderer if any(m.role == TOOLS for m in messages) else self._renderer
        messages, own_rules = renderer.with_known_roles(messages)

        def render(form: Sequence[Message]) -> tuple[Sequence[Message], dict[int, str], Conversation, MaskedText]:
            written, thoughts = renderer.thoughts.write(form)
            conversation = build_conversation(written, self.train_on, self.tokenizer)
            return written, thoughts, *renderer.render(conversation, prompt, self.train_on == "all")

        (messages, thoughts, conversation, masked), rules = render_in_a_form(messages, render)
        if prompt:
            prefix_ids = self._bos(masked)
            return Draft(masked.paths, conversation.break_char, prefix_ids=prefix_ids, conversation=conversation)
        if self.train_on != "all" and not masked.trains:
            raise nothing_to_train(conversation, masked)
        counts, lost = answer_counts(messages, conversation, masked, thoughts)
        unused = renderer.unused_parts.find(messages, conversation, masked.text, self.train_on)
        return Draft(
            masked.paths,
            conversation.break_char,
            conversation.control_strings,
            masked.end_trained or (any(path.unclosed for path in masked.paths) and len(self._eos) > 0),
            self._bos(masked),
            self._eos,
            replace(unused, thoughts=lost) if lost and self._options.thinking != "drop" else unused,
            replace(counts, merges=(*own_rules, *rules)) if own_rules or rules else counts,
        )

    def _bos(self, masked: MaskedText) -> Ints:
        """The beginning-of-text token, if the tokenizer adds one and the template does not write it."""
        if not self.tokenizer.adds_bos or masked.text.startswith(self.tokenizer.bos):
            return NO_IDS
        return np.array([self.tokenizer.bos_id], dtype=np.int32)

    def _finish(self, item: Item, draft: Any, tokens: Any, unknown_tokens: int | RecordError) -> Encoded | RecordError:
        """The result for one item. tokens: of its draft."""
        where, messages = item
        if isinstance(unknown_tokens, RecordError):
            return unknown_tokens
        if not _is(messages, TOKENS):
            example = build_example(where, draft, tokens, self.train_on == "all")
            return Encoded(
                example,
                draft.control_strings,
                draft.end_trained,
                unknown_tokens,
                draft.unused,
                TEXT if _is(messages, TEXT) else "",
                draft.answers,
            )
        try:
            example = from_token_record(where, messages[0], self.vocab_size)
        except RecordError as error:
            return error
        last = int(example.labels[example.labels != IGNORED][-1])
        return Encoded(example, end_trained=self.tokenizer.is_control(last), kind=TOKENS)


def _all_trained(text: str) -> TextPath:
    return TextPath(text, (Stretch(0, 0, len(text)),), unclosed=True)


def _is(messages: Sequence[Message], role: str) -> bool:
    return len(messages) == 1 and messages[0].role == role
