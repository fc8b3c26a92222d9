"""`qlora chat`: lines in, answers out; a line that begins with / is a command. The same for a terminal and a pipe."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from difflib import get_close_matches
from typing import NamedTuple, Protocol

from qlora.data.types import Message
from qlora.errors import InputError, QloraError
from qlora.runs.adapter_names import BASE
from qlora.runs.conversation import ChatSession

HELP = """\
/adapter [NAME]          which adapter answers; base is the base alone; a:0.5 b:0.5 mixes two
/compare [TEXT]          the base beside the adapter, same seed; without TEXT the last question again
/system [TEXT]           what the model is told before the conversation; without TEXT nothing
/retry                   take the last answer back and draw another
/reset                   forget the conversation
/save FILE.jsonl         append the conversation as a row to train on
/help  /exit             Ctrl-C stops an answer, Ctrl-D leaves; // begins a text that begins with /"""


class ExitChat(Exception):
    """The user wants to go."""


class Screen(Protocol):
    """Where answers and notices go."""

    def answer(self, who: str, pieces: Iterator[str]) -> None:
        """Print an answer as it comes, after the name of who gives it, if that is not empty."""

    def notice(self, text: str) -> None:
        """Print a line about the conversation."""


class ChatLoop(NamedTuple):
    """A conversation and the screen it is held on."""

    talk: ChatSession
    screen: Screen


def converse(talk: ChatSession, screen: Screen, lines: Iterable[str]) -> None:
    """Answer each line until there is none, or /exit. A mistake is told, and the conversation goes on."""
    chat = ChatLoop(talk, screen)
    for line in lines:
        try:
            _take(chat, line.strip())
        except ExitChat:
            return
        except QloraError as error:
            screen.notice(f"error: {error}")


def _take(chat: ChatLoop, line: str) -> None:
    if not line:
        return
    if not line.startswith("/") or line.startswith("//"):
        return _show(chat, "", chat.talk.ask(line[1:] if line.startswith("//") else line))
    word, _, rest = line.partition(" ")
    if word not in COMMANDS:
        near = get_close_matches(word, COMMANDS, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise InputError(f"{word} is no command.{hint} /help lists them; // begins a text that begins with /.")
    return COMMANDS[word](chat, rest.strip())


def _show(chat: ChatLoop, who: str, pieces: Iterator[str]) -> None:
    with closing(pieces):  # type: ignore[type-var]
        try:
            chat.screen.answer(who, pieces)
        except KeyboardInterrupt:
            chat.screen.notice("(stopped; what was said is kept)")


def _adapter(chat: ChatLoop, words: str) -> None:
    switch = chat.talk.switch
    if words:
        _use(chat, words)
    acting = switch.name or BASE
    known = [f"{name}{' *' if name == acting else ''}" for name in (BASE, *switch.names)]
    if acting not in (BASE, *switch.names):
        known.append(f"{acting} *")
    chat.screen.notice("adapters: " + ", ".join(known))


def _use(chat: ChatLoop, words: str) -> None:
    switch, parts = chat.talk.switch, words.split()
    if len(parts) == 1 and ":" not in words:
        return switch.use(None if words == BASE else words)
    weights: dict[str, float] = {}
    for part in parts:
        name, _, weight = part.partition(":")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            raise InputError(f"/adapter: {part!r}: a mix is written NAME:WEIGHT, as in polite:0.5.") from None
    return switch.mix(weights)


def _compare(chat: ChatLoop, text: str) -> None:
    talk = chat.talk
    if talk.switch.name is None:
        known = ", ".join(talk.switch.names) or "none is held"
        raise InputError(f"the base answers alone: /adapter NAME first ({known}).")
    tuned = talk.switch.name
    if text:
        talk.tries = 0
        _show(chat, BASE, talk.aside([*talk.messages, Message("user", text)], base=True))
        return _show(chat, tuned, talk.ask(text))
    asked = talk.question()
    _show(chat, BASE, talk.aside(asked, base=True))
    return _show(chat, tuned, talk.aside(asked, base=False))


def _system(chat: ChatLoop, text: str) -> None:
    chat.talk.system = text
    chat.screen.notice("system prompt set" if text else "no system prompt")


def _reset(chat: ChatLoop, _: str) -> None:
    chat.talk.reset()
    chat.screen.notice("the conversation begins anew")


def _retry(chat: ChatLoop, _: str) -> None:
    another = chat.talk.retry()
    if chat.talk.temperature == 0:
        chat.screen.notice("at temperature 0 the answer is always the same; --temperature 0.7 would draw another")
    _show(chat, "", another)


def _save(chat: ChatLoop, file: str) -> None:
    rows = chat.talk.save(file)
    chat.screen.notice(f"saved as row {rows} of {file}")


def _help(chat: ChatLoop, _: str) -> None:
    chat.screen.notice(HELP)


def _exit(chat: ChatLoop, _: str) -> None:
    raise ExitChat


COMMANDS: dict[str, Callable[[ChatLoop, str], None]] = {
    "/adapter": _adapter,
    "/compare": _compare,
    "/system": _system,
    "/retry": _retry,
    "/reset": _reset,
    "/save": _save,
    "/help": _help,
    "/exit": _exit,
}
