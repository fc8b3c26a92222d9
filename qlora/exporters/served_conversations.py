"""Whether an exported folder makes the prompts of training: rendered and tokenized as a server does, ids compared."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from qlora.data import Source
from qlora.data.conversations.chat_template import Turn
from qlora.data.conversations.encode_records import read_conversations
from qlora.data.conversations.encoder import Encoder
from qlora.data.reading.source import read_sources
from qlora.data.types import TEXT, TOKENS, TOOLS, BadRecord, Message, Record, RecordError
from qlora.errors import BaseModelError, DataError, QloraError, first_line
from qlora.model.meta_model import read_tokenizer
from qlora.recipe.default_recipe import has_data
from qlora.runs.load_run import LoadedRun

RECORDS = 64  # of the run's data whose conversations are compared
RECORD_PROMPTS = 4  # of one record: those before its first answers
_TEXTS = ("Hello there.", "Good day!", "  How many moons\n\nhas it? ", "Two:\n- Phobos\n- Deimos", "And now?")


@dataclass(frozen=True)
class ServedConversation:
    """A conversation as the template read it in training, up to the next answer, and its prompt ids there."""

    where: str
    turns: Sequence[Turn]
    ids: list[int]
    tools: Sequence[Any] | None = None


@dataclass(frozen=True)
class ConversationAgreement:
    """How many conversations have the same prompt ids in training and from the written folder."""

    compared: int
    equal: int
    different: str = ""  # the first one that differs, and where

    def __str__(self) -> str:
        text = f"chat template and tokenizer: {self.equal} of {self.compared} prompts have the token ids of training"
        return f"{text}; {self.different}" if self.different else text

    @classmethod
    def of(cls, differences: Sequence[str]) -> "ConversationAgreement":
        """The counts of conversations from where each differs; an empty text: it does not."""
        return cls(len(differences), differences.count(""), next((text for text in differences if text), ""))

    def as_json(self) -> dict[str, int]:
        """The counts, as in certificate.json and `export --json`."""
        return {"compared": self.compared, "equal": self.equal}


def fixed_probes(encoder: Encoder) -> list[ServedConversation]:
    """Prompts after 1, 2 and 4 turns of the user, with and without a system message, as training makes them."""
    turns = [Message(("user", "assistant")[index % 2], _TEXTS[index % len(_TEXTS)]) for index in range(7)]
    system = Message("system", "Be brief.")
    prompts = [*(turns[:count] for count in (1, 3, 7)), [system, turns[0]], [system, *turns[:3]]]
    return list(_conversations(encoder, ((f"probe {number}", p) for number, p in enumerate(prompts, 1))))


def probe_conversations(run: LoadedRun, data: str | None = None, records: int = RECORDS) -> list[ServedConversation]:
    """Prompts of records of `data` or the run's data (its data.eval, if it has one), and the fixed probes.

    Prompts in whose text a server would read control tokens, which training does not, are left out.
    """
    prompts = ((where, p) for where, item in _records(run, data, records) for p in _prompts(item))
    return [*_conversations(run.encoder, prompts), *fixed_probes(run.encoder)]


def compare_conversations(conversations: Sequence[ServedConversation], folder: Path) -> ConversationAgreement:
    """The ids of training against those that transformers and the servers make from the files in `folder`."""
    try:
        tokenizer = read_tokenizer(folder)
    except BaseModelError as error:
        return ConversationAgreement(len(conversations), 0, f"the folder has no tokenizer ({error})")
    return ConversationAgreement.of([_difference(tokenizer, conversation) for conversation in conversations])


def refuse_other_prompts(agreement: ConversationAgreement) -> None:
    """QloraError if a prompt differs."""
    if agreement.equal < agreement.compared:
        raise QloraError(
            f"export: {agreement}. A server would send other prompts than were trained; nothing was exported. "
            "Name another template (model.chat_template), or --rows 0 to export it without a certificate."
        )


def ids_of_server(tokenizer: Any, conversation: ServedConversation, chat_template: str | None = None) -> list[int]:
    """Prompt ids as a server makes them: the rendered text is tokenized without adding special tokens.

    RecordError if the template refuses the conversation, or there is none.
    """
    try:
        text = tokenizer.apply_chat_template(
            conversation.turns,
            tools=conversation.tools,
            chat_template=chat_template,
            add_generation_prompt=True,
            tokenize=False,
        )
    except Exception as error:  # a template is a program: it may raise anything
        raise RecordError("refused by the chat template", first_line(error, 200)) from None
    return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


def _difference(tokenizer: Any, conversation: ServedConversation) -> str:
    """Where a conversation differs; empty if it does not."""
    try:
        ids = ids_of_server(tokenizer, conversation)
    except RecordError as error:
        return f"{conversation.where}: {error}"
    return where_different(conversation, ids)


def where_different(conversation: ServedConversation, ids: Sequence[int]) -> str:
    """From which token on `ids` are not those of training; empty if they are."""
    if ids == conversation.ids:
        return ""
    pairs = zip([*ids, None], [*conversation.ids, None], strict=False)
    at = next(index for index, (one, other) in enumerate(pairs) if one != other)
    return (
        f"{conversation.where}: from token {at} on {conversation.ids[at : at + 4]} in training, {ids[at : at + 4]} here"
    )


def _conversations(encoder: Encoder, prompts: Iterator[tuple[str, Sequence[Message]]]) -> Iterator[ServedConversation]:
    for where, messages in prompts:
        try:
            ids, conversation = encoder.read_prompt(messages)
        except RecordError:
            continue
        if conversation is not None and not conversation.control_strings:
            yield ServedConversation(where, conversation.turns, ids, conversation.tools)


def _prompts(messages: Sequence[Message]) -> Iterator[Sequence[Message]]:
    """The messages before each of the first answers of a conversation."""
    if len(messages) == 1 and messages[0].role in (TEXT, TOKENS):
        return
    ends = (i for i, message in enumerate(messages) if message.role == "assistant" and messages[i - 1].role != TOOLS)
    yield from (messages[:end] for end in islice(ends, RECORD_PROMPTS) if end)


def _records(run: LoadedRun, data: str | None, count: int) -> Iterator[tuple[str, Sequence[Message]]]:
    """Conversations of the first records, of pairs the chosen sides; none where the data can't be read."""
    section, sided = run.recipe.data, None if data else run.recipe.objective.sided_format
    sources = [Source(path=data)] if data else [*(section.eval or section.train)] if has_data(run.recipe) else []
    for item in sources:
        try:
            for record in islice(read_sources([item], run.recipe.train.seed), count):
                yield from _conversation_of(record, sided or item.format or ("auto" if data else section.format))
        except DataError:  # missing by now: the fixed probes are left
            continue


def _conversation_of(record: Record | BadRecord, kind: str) -> Iterator[tuple[str, Sequence[Message]]]:
    if isinstance(record, Record):
        with suppress(RecordError):
            yield record.where, read_conversations(record, kind)[0]
