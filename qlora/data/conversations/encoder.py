"""The encoder: messages -> examples with verified loss masks, and prompts tokenized the same way."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from qlora.data.conversations import record_limits
from qlora.data.conversations.build_example import (
    NO_IDS,
    NOTHING,
    Draft,
    Encoded,
    build_example,
    from_token_record,
    verify_masks,
)
from qlora.data.conversations.chat_messages import Conversation, build_conversation
from qlora.data.conversations.chat_template import PLAIN, TemplateOptions
from qlora.data.conversations.loss_mask import MaskedText, may_write_thoughts
from qlora.data.conversations.renderer import build_renderers
from qlora.data.conversations.safe_tokenizer import TextPiece
from qlora.data.types import IGNORED, TEXT, TOKENS, Example, Ints, Message, RecordError

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
        masks = self._options.masks_empty_thinking and may_write_thoughts(self.template.text)
        inputs += ["empty thinking masked"] if masks else []
        return hashlib.sha256("\0".join(inputs).encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def uses_plain_template(self) -> bool:
        """Whether conversations are rendered with qlora's plain template, because the model has none."""
        return self.template.text == PLAIN

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
            drafts = [self._draft(messages) for _, messages in items]
        valid_drafts = [draft for draft in drafts if isinstance(draft, Draft)]
        ids = self.tokenizer.encode([(draft.pieces, draft.break_char) for draft in valid_drafts])
        tokenized = [
            (d, piece_ids) for d, piece_ids in zip(valid_drafts, ids, strict=True) if isinstance(piece_ids, list)
        ]
        verified = iter(
            verify_masks([d for d, _ in tokenized], [piece_ids for _, piece_ids in tokenized], self.tokenizer)
        )
        remaining_ids = iter(ids)
        return [
            self._finish(item, draft, next(remaining_ids) if isinstance(draft, Draft) else draft, verified)
            for item, draft in zip(items, drafts, strict=True)
        ]

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a prompt: those that training puts before the next answer. RecordError if refused."""
        with record_limits.memory():
            draft = self._text(messages[0]) if _is(messages, TEXT) else self._conversation(messages, prompt=True)
        if isinstance(draft, RecordError):
            raise draft
        ids = self.tokenizer.encode([(draft.pieces, draft.break_char)])[0]
        if isinstance(ids, RecordError):
            raise ids
        return [int(token) for token in np.concatenate([draft.prefix_ids, *ids])]

    def decode(self, ids: Sequence[int] | Ints) -> str:
        """The text of `ids`, control tokens included."""
        return self.tokenizer.decode([np.asarray(ids, dtype=np.int32)])[0]

    def _draft(self, messages: Sequence[Message]) -> Draft | RecordError:
        """The draft of a record; empty for one that is tokenized already."""
        if _is(messages, TOKENS):
            return Draft()
        return self._text(messages[0]) if _is(messages, TEXT) else self._conversation(messages)

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
            return Draft((TextPiece(text, True),), prefix_ids=prefix_ids, suffix_ids=suffix_ids)
        try:
            (text,), break_char, control_strings = self.tokenizer.break_control_strings([message.content], [True])
        except RecordError as error:
            return error
        piece = TextPiece(text, True)
        return Draft((piece,), break_char, control_strings, prefix_ids=prefix_ids, suffix_ids=suffix_ids)

    def _conversation(self, messages: Sequence[Message], prompt: bool = False) -> Draft | RecordError:
        try:
            with record_limits.time_limit():
                conversation = build_conversation(messages, self.train_on, self.tokenizer)
                renderer = self._tool_renderer if conversation.tools else self._renderer
                conversation, masked = renderer.render(conversation, prompt, self.train_on == "all")
                find_unused = renderer.unused_parts.find
                unused = NOTHING if prompt else find_unused(messages, conversation, masked.text, self.train_on)
        except RecordError as error:
            return error
        except MemoryError:
            return RecordError("takes too much memory to render")
        if not prompt and self.train_on != "all" and not any(piece.trained for piece in masked.pieces):
            return _nothing_to_train(conversation, masked)
        eos = self._eos if masked.needs_eos and conversation.trained[-1] else NO_IDS
        return Draft(
            masked.pieces,
            conversation.break_char,
            conversation.control_strings,
            0 if self.train_on == "all" else _untrained_answers(conversation, masked),
            masked.end_trained or len(eos) > 0,
            self._bos(masked),
            eos,
            unused,
        )

    def _bos(self, masked: MaskedText) -> Ints:
        """The beginning-of-text token, if the tokenizer adds one and the template does not write it."""
        text = masked.pieces[0].text if masked.pieces else ""
        if not self.tokenizer.adds_bos or text.startswith(self.tokenizer.bos):
            return NO_IDS
        return np.array([self.tokenizer.bos_id], dtype=np.int32)

    def _finish(self, item: Item, draft: Any, ids: Any, verified: Iterator[int | RecordError]) -> Encoded | RecordError:
        """The result for one item. ids: of its draft's pieces, or the reason why it has none."""
        where, messages = item
        if isinstance(ids, RecordError):
            return ids
        unknown_tokens = next(verified)
        if isinstance(unknown_tokens, RecordError):
            return unknown_tokens
        if not _is(messages, TOKENS):
            example = build_example(where, draft, ids, self.train_on == "all")
            return Encoded(
                example,
                draft.control_strings,
                draft.untrained_answers,
                draft.end_trained,
                unknown_tokens,
                draft.unused,
                TEXT if _is(messages, TEXT) else "",
            )
        try:
            example = from_token_record(where, messages[0], self.vocab_size)
        except RecordError as error:
            return error
        last = int(example.labels[example.labels != IGNORED][-1])
        return Encoded(example, end_trained=self.tokenizer.is_control(last), kind=TOKENS)


def _is(messages: Sequence[Message], role: str) -> bool:
    return len(messages) == 1 and messages[0].role == role


def _untrained_answers(conversation: Conversation, masked: MaskedText) -> int:
    """Number of answers to be trained that the template rewrites."""
    return sum(conversation.trained[i] for i in masked.unlocated)


def _nothing_to_train(conversation: Conversation, masked: MaskedText) -> RecordError:
    """Why no piece of a conversation is trained."""
    if len(conversation.turns) == 1 and conversation.trained[0]:
        return RecordError("no prompt", 'the only message is the assistant\'s. As plain text it is {"text": ...}')
    if _untrained_answers(conversation, masked):
        detail = "the template's prompt for the answer is not the beginning of its rendering with the answer"
        return RecordError("prefix not kept", detail)
    if not any(turn["role"] == "assistant" for turn in conversation.turns):
        return RecordError("no assistant turn")
    return RecordError("nothing to train", "data.train_on and the record's own loss keys select no answer")
