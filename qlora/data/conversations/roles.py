"""Messages that a chat template refuses as they are, in a form that it takes: stated rules, each use of one counted.

A developer's message becomes a system message where the template does not write that role. Where the template refuses
a conversation, user messages in a row become one, and a system message at the start goes into the first user message,
each with an empty line between the texts. Nothing else is changed: two answers in a row stay refused.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

from qlora.data.conversations.chat_template import Template
from qlora.data.types import TOOLS, Message, RecordError

DEVELOPER_AS_SYSTEM = "a developer's message as a system message"
USERS_MERGED = "user messages in a row as one"
SYSTEM_MERGED = "the system message in the first user message"
REFUSED = "refused by the chat template"
_MARKER = "Zephyrs vexed my jaw"

Changed = tuple[list[Message], tuple[str, ...]]  # messages, and the rules that were applied
Result = TypeVar("Result")


def writes_role(template: Template, role: str) -> bool:
    """Whether `template` writes a message of `role` that comes first."""
    turns = [{"role": role, "content": _MARKER}, {"role": "user", "content": "Judge my vow."}]
    try:
        return _MARKER in template.render([*turns, {"role": "assistant", "content": "Judged."}])
    except RecordError:
        return False


def as_system(messages: Sequence[Message]) -> Changed:
    """`messages` with the developer's as system messages."""
    changed = [replace(message, role="system") if message.role == "developer" else message for message in messages]
    return changed, (DEVELOPER_AS_SYSTEM,)


def render_in_a_form(messages: Sequence[Message], render: Callable[[Sequence[Message]], Result]) -> tuple[
    Result, tuple[str, ...]
]:  # fmt: skip
    """What `render` makes of the first form of `messages` that the template takes, and the rules of that form.

    RecordError, that of the record's own form, if it takes none.
    """
    try:
        return render(messages), ()
    except RecordError as error:
        if error.reason != REFUSED:
            raise
        first = error
    for changed, rules in _forms(messages):
        try:
            return render(changed), rules
        except RecordError:
            continue
    raise first


def _forms(messages: Sequence[Message]) -> Iterator[Changed]:
    users, both = _with_users_merged(messages), _with_users_merged(_with_system_merged(messages))
    system = _with_system_merged(messages)
    if len(users) < len(messages):
        yield users, (USERS_MERGED,)
    if len(system) < len(messages):
        yield system, (SYSTEM_MERGED,)
        if len(both) < len(system):
            yield both, (SYSTEM_MERGED, USERS_MERGED)


def _with_users_merged(messages: Sequence[Message]) -> list[Message]:
    """User messages in a row as one; those whose flags differ stay apart."""
    merged = list[Message]()
    for message in messages:
        last = merged[-1] if merged else None
        if (
            last
            and last.role == message.role == "user"
            and (last.train, last.prompt) == (message.train, message.prompt)
        ):
            merged[-1] = replace(last, content=_joined(last, message), extra={**message.extra, **last.extra})
        else:
            merged.append(message)
    return merged


def _with_system_merged(messages: Sequence[Message]) -> list[Message]:
    """The system messages at the start, in the user message that follows them."""
    rest = [message for message in messages if message.role != TOOLS]
    count = next((i for i, message in enumerate(rest) if message.role != "system"), 0)
    if not count or rest[count].role != "user":
        return list(messages)
    texts = "\n\n".join(message.content for message in rest[:count])
    tools = [message for message in messages if message.role == TOOLS]
    return [*tools, replace(rest[count], content=f"{texts}\n\n{rest[count].content}"), *rest[count + 1 :]]


def _joined(first: Message, second: Message) -> str:
    return f"{first.content}\n\n{second.content}"
