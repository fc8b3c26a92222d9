"""Messages -> examples: one way of tokenising for training, evaluation and prompts, with a proved mask."""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from qlora.data.conversations import record_limits
from qlora.data.conversations.build_example import NO_IDS, Draft, Encoded, assemble, given, prove
from qlora.data.conversations.chat_messages import Conversation, chat_of
from qlora.data.conversations.chat_template import PLAIN, Template
from qlora.data.conversations.loss_mask import LossMasker, MaskedText
from qlora.data.conversations.safe_tokenizer import SafeTokenizer, TextPiece
from qlora.data.conversations.template_probe import probe
from qlora.data.types import IGNORED, TEXT, TOKENS, Example, Ints, Message, RecordError
from qlora.errors import DataError

Item = tuple[str, Sequence[Message]]  # where, messages


class Encoder:
    """Turns messages into token ids with the template of `tokenizer` (a PreTrainedTokenizerFast).

    train_on: assistant (every answer), last (the last one), all (every token). DataError for an unusable template.
    """

    def __init__(self, tokenizer: Any, train_on: str = "assistant", chat_template: str = "auto") -> None:
        self.train_on = train_on
        self.template = Template(tokenizer, chat_template)
        probe(self.template)
        self.tokeniser = SafeTokenizer(tokenizer, self.template.text)
        self.vocabulary = len(tokenizer)
        self._special = json.dumps([tokenizer.special_tokens_map, self.vocabulary], sort_keys=True, default=str)
        eos = tokenizer.eos_token_id
        self._eos = NO_IDS if eos is None else np.array([eos], dtype=np.int32)
        try:  # what the probe's child could not hold, jinja2 may have folded into the code it compiles here
            with record_limits.memory(), record_limits.time_limit():
                self._cutter = LossMasker(self.template, self.tokeniser)
        except (RecordError, MemoryError) as error:
            why = str(error) or "takes too much memory to compile"
            raise DataError(f"{self.template.name}: {why}. Give another one with model.chat_template.") from None

    @cached_property
    def sha256(self) -> str:
        """A digest of all that decides which tokens a row becomes: vocabulary, merges, control tokens, template."""
        said = [self.tokeniser.as_json(), self._special, self.template.text, self.train_on]
        return hashlib.sha256("\0".join(said).encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def is_plain(self) -> bool:
        """Whether conversations are written with our plain template, for want of one of the model's own."""
        return self.template.text == PLAIN

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know about this template before training with it."""
        ending, found = self._cutter.ending, [f"conversations are written with {self.template.name}"]
        if not ending.token:
            closing = repr(ending.text) if ending.text else "nothing"
            found.append(f"it closes an answer with {closing}, no token: the end token is put after the last one")
        if ending.rest:
            found.append("its prompt goes on differently from its answers: they are trained from where the two part")
        return tuple(found)

    def encode(self, where: str, messages: Sequence[Message]) -> Example:
        """The example that `messages` make. RowError if they can't be trained on."""
        made = self.encode_all([(where, messages)])[0]
        if isinstance(made, RecordError):
            raise made
        return made.example

    def encode_all(self, items: Sequence[Item]) -> list[Encoded | RecordError]:
        """`encode` for many rows at once, which is much faster; a RowError in the place of each that can't be used."""
        with record_limits.memory():
            drafts = [self._draft(messages) for _, messages in items]
        ready = [draft for draft in drafts if isinstance(draft, Draft)]
        ids = self.tokeniser.encode([(draft.pieces, draft.mark) for draft in ready])
        sound = [(draft, parts) for draft, parts in zip(ready, ids, strict=True) if not isinstance(parts, RecordError)]
        proofs = iter(prove([draft for draft, _ in sound], [parts for _, parts in sound], self.tokeniser))
        each = iter(ids)
        return [
            self._finish(item, draft, next(each) if isinstance(draft, Draft) else draft, proofs)
            for item, draft in zip(items, drafts, strict=True)
        ]

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The ids a model goes on from: those that training puts before the next answer. RowError if refused."""
        with record_limits.memory():
            draft = self._document(messages[0]) if _is(messages, TEXT) else self._chat(messages, prompt=True)
        if isinstance(draft, RecordError):
            raise draft
        ids = self.tokeniser.encode([(draft.pieces, draft.mark)])[0]
        if isinstance(ids, RecordError):
            raise ids
        return [int(token) for token in np.concatenate([draft.head, *ids])]

    def decode(self, ids: Sequence[int] | Ints) -> str:
        """The text of `ids`, control tokens written out."""
        return self.tokeniser.decode([np.asarray(ids, dtype=np.int32)])[0]

    def _draft(self, messages: Sequence[Message]) -> Draft | RecordError:
        """The draft of a row; one that is tokens already gets an empty one."""
        if _is(messages, TOKENS):
            return Draft()
        return self._document(messages[0]) if _is(messages, TEXT) else self._chat(messages)

    def _document(self, message: Message) -> Draft | RecordError:
        try:
            (text,), mark, forged = self.tokeniser.guard([message.content], [True])
        except RecordError as error:
            return error
        head, tail = (np.array(ids, dtype=np.int32) for ids in (self.tokeniser.head, self.tokeniser.tail))
        if not np.array_equal(tail[-1:], self._eos):
            tail = np.concatenate([tail, self._eos])
        return Draft((TextPiece(text, True),), mark, forged, head=head, tail=tail)

    def _chat(self, messages: Sequence[Message], prompt: bool = False) -> Draft | RecordError:
        try:
            with record_limits.time_limit():
                chat = chat_of(messages, self.train_on, self.tokeniser)
                if chat.tools and "tools" not in self.template.text:
                    raise RecordError("the template does not write tools", f"{len(chat.tools)} tools would be lost")
                cut = self._cutter.cut(chat, prompt)
        except RecordError as error:
            return error
        except MemoryError:
            return RecordError("takes too much memory to render")
        if not prompt and self.train_on != "all" and not any(piece.trained for piece in cut.pieces):
            return _nothing(chat, cut)
        tail = self._eos if cut.bare and chat.wanted[-1] else NO_IDS
        return Draft(cut.pieces, chat.mark, chat.forged, cut.skipped, cut.ends or len(tail) > 0, self._bos(cut), tail)

    def _bos(self, cut: MaskedText) -> Ints:
        """The beginning-of-text token, if this tokenizer wants one and the template does not write it."""
        text = cut.pieces[0].text if cut.pieces else ""
        if not self.tokeniser.adds_bos or text.startswith(self.tokeniser.bos):
            return NO_IDS
        return np.array([self.tokeniser.bos_id], dtype=np.int32)

    def _finish(self, item: Item, draft: Any, ids: Any, proofs: Any) -> Encoded | RecordError:
        where, messages = item
        if isinstance(ids, RecordError):
            return ids
        unknown = next(proofs)
        if isinstance(unknown, RecordError):
            return unknown
        if not _is(messages, TOKENS):
            example = assemble(where, draft, ids, self.train_on == "all")
            return Encoded(example, draft.forged, draft.skipped, draft.ends, unknown)
        try:
            example = given(where, messages[0], self.vocabulary)
        except RecordError as error:
            return error
        return Encoded(example, ends=self.tokeniser.is_control(int(example.labels[example.labels != IGNORED][-1])))


def _is(messages: Sequence[Message], role: str) -> bool:
    return len(messages) == 1 and messages[0].role == role


def _nothing(chat: Conversation, cut: MaskedText) -> RecordError:
    if cut.skipped:
        return RecordError(
            "prefix not kept", "the template gives no prompt that its rendering of the answer begins with"
        )
    if not any(turn["role"] == "assistant" for turn in chat.turns):
        return RecordError("no assistant turn")
    return RecordError("nothing to train", "no answer is asked for by train_on and the messages' own train")
