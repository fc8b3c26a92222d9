"""Prompts in a JSONL file: `prompt` (a text) or `messages` in each line."""

from pathlib import Path

from qlora.data.formats.messages import parse_messages
from qlora.data.reading.readers import read_jsonl
from qlora.data.types import BadRecord, Message, Record
from qlora.errors import DataError
from qlora.utils.paths import similar_path

Prompt = tuple[str, list[Message]]  # as shown to the user, and as messages


def read_prompt_file(path: str) -> list[Prompt]:
    """The prompts of a file. DataError if it does not exist, or a line holds none."""
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file. Give a text, a JSONL file, or - for stdin.{similar_path(Path(path))}")
    return [_prompt_of_record(record) for record in read_jsonl(Path(path), path)]


def user_prompt(text: str) -> Prompt:
    """A text as the message of a user."""
    return text, [Message("user", text)]


def _prompt_of_record(record: Record | BadRecord) -> Prompt:
    if isinstance(record, BadRecord):
        raise DataError(f"{record.where}: {record.message}")
    if isinstance(record.fields.get("prompt"), str):
        return user_prompt(record.fields["prompt"])
    if "messages" in record.fields:
        messages = parse_messages(record.fields["messages"], "messages")
        return "\n".join(f"{message.role}: {message.content}" for message in messages), messages
    fields = ", ".join(record.fields) or "no fields"
    raise DataError(f"{record.where}: found {fields}; a line needs `prompt` (a text) or `messages`.")
