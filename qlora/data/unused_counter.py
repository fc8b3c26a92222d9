"""What the records of a data set hold and training does not use, counted and reported once."""

from collections.abc import Iterable

from qlora.data.occurrences import Occurrences
from qlora.data.reading import loss_keys
from qlora.data.types import Unused

# Keys that other tools read as part of the conversation.
_CONTENT_KEYS = ("system", "system_prompt", "tools", "functions", "history", "documents", "chat_template_kwargs",
                 "image", "images", "video", "videos", "audio", "audios", "function_call", "reasoning",
                 "reasoning_content", "thinking", "thought", "thoughts", "rationale", "cot")  # fmt: skip
_RECORD_KEYS = (*loss_keys.RECORD_KEYS, *loss_keys.TOKEN_KEYS, *_CONTENT_KEYS)
_MESSAGE_KEYS = (*loss_keys.MESSAGE_KEYS, "tool_calls")
_NOTHING = Unused()
_LISTED, _MOST_NAMES = 12, 1000  # keys in a line, and in memory


class UnusedCounter:
    """Counts the unused parts of the records of a data set."""

    def __init__(self) -> None:
        self._records: dict[str, Occurrences] = {}  # a kind of unused part -> the records that have it
        self._names: dict[str, dict[str, None]] = {}  # the same kind -> the names of keys or roles

    def add(self, where: str, unused: Unused) -> None:
        """Count the unused parts of one record."""
        if unused == _NOTHING:
            return
        fields, keys = _sorted(unused.fields, _RECORD_KEYS), _sorted(unused.keys, _MESSAGE_KEYS)
        self._count("content", where, [*fields["content"], *keys["content"]])
        self._count("masks", where, [*fields["masks"], *keys["masks"]])
        self._count("fields", where, fields["others"])
        self._count("keys", where, keys["others"])
        self._count("thoughts", where, unused.thoughts)
        self._count("contents", where, unused.contents)
        self._count("trained_roles", where, unused.trained_roles)

    def _count(self, kind: str, where: str, names: Iterable[str]) -> None:
        names = list(names)
        if names:
            self._records.setdefault(kind, Occurrences()).add(where)
            known = self._names.setdefault(kind, {})
            known.update(dict.fromkeys(names if len(known) < _MOST_NAMES else ()))

    def warnings(self) -> list[str]:
        """One line for each kind of unused part that changes what is trained."""
        return [
            self._records[kind].describe(text.format(names=self._listed(kind)))
            for kind, text in _WARNINGS.items()
            if kind in self._records
        ]

    def note(self, where: str) -> list[str]:
        """One line about keys that are not read and look like notes of the data set's author."""
        parts = [("fields", "of records"), ("keys", "of messages")]
        listed = [f"{self._listed(kind)} ({text})" for kind, text in parts if kind in self._records]
        return [f"{where}: keys that are not read: {'; '.join(listed)}"] if listed else []

    def _listed(self, kind: str) -> str:
        names = list(self._names.get(kind, ()))
        return ", ".join([*names[:_LISTED], *([f"and {len(names) - _LISTED} more"] if names[_LISTED:] else [])])


def _sorted(keys: Iterable[str], known: tuple[str, ...]) -> dict[str, list[str]]:
    """Unread keys by kind: content, keys that look like a loss mask, others."""
    kinds: dict[str, list[str]] = {"content": [], "masks": [], "others": []}
    for key in keys:
        if key.lower() in _CONTENT_KEYS:
            kinds["content"].append(key)
        elif loss_keys.looks_like_one(key, known):
            kinds["masks"].append(loss_keys.nearest(key, known))
        else:
            kinds["others"].append(key)
    return kinds


_WARNINGS = {
    "thoughts": "have thoughts ({names}) that the chat template does not write: the answers are trained without them. "
    "Set data.thinking: in_content, which writes <think>...</think> where the template has no place for thoughts, or "
    "name a template that writes them in model.chat_template",
    "masks": "have keys that look like a loss mask and are NOT read: {names}. They mask nothing. Loss keys "
    f"of a message: {', '.join(loss_keys.MESSAGE_KEYS)}; of a record: {loss_keys.RECORD_KEYS[0]}, a list",
    "content": "have content that is NOT read: {names}. Only text in the fields of the format is trained; "
    "data.train.columns renames fields",
    "contents": "have messages of the role {names} whose content the chat template does not write: it is lost. Name a "
    "template that writes it in model.chat_template, or move the text into a user message",
    "trained_roles": "ask for loss on messages of the role {names}: only the assistant's bear loss. data.train_on: all "
    "trains every token",
}
