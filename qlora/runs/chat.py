"""`qlora chat`: the loop over input lines. A line that starts with / is a command; a terminal and a pipe are alike."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from difflib import get_close_matches
from typing import NamedTuple, Protocol

from qlora.data.types import Message
from qlora.errors import InputError, QloraError
from qlora.runs.adapter_names import BASE
from qlora.runs.conversation import ChatSession

HELP = """\
/adapter [NAME]          switch the adapter; base: the base model alone; a:0.5 b:0.5 mixes two
/compare [TEXT]          base and adapter, same seed; without TEXT: the last question again
/system [TEXT]           set the system prompt; without TEXT: remove it
/retry                   replace the last answer by another one
/reset                   clear the conversation
/save FILE.jsonl         append the conversation as a record to train on
/help  /exit             Ctrl-C stops an answer, Ctrl-D exits; a text that starts with / is typed with //"""


class ExitChat(Exception):
    """The user ended the chat."""


class Screen(Protocol):
    """The output of a chat."""

    def answer(self, name: str, pieces: Iterator[str]) -> None:
        """Print an answer as it is streamed, after the adapter's name if that is not empty."""

    def info(self, text: str) -> None:
        """Print a line about the conversation."""


class ChatLoop(NamedTuple):
    """A chat session and its screen."""

    session: ChatSession
    screen: Screen


def run_chat(session: ChatSession, screen: Screen, lines: Iterable[str]) -> None:
    """Answer each line until the input ends, or /exit. An error is printed, and the chat continues."""
    loop = ChatLoop(session, screen)
    for line in lines:
        try:
            _process_line(loop, line.strip())
        except ExitChat:
            return
        except QloraError as error:
            screen.info(f"error: {error}")


def _process_line(loop: ChatLoop, line: str) -> None:
    if not line:
        return
    if not line.startswith("/") or line.startswith("//"):
        return _print_answer(loop, "", loop.session.answer(line[1:] if line.startswith("//") else line))
    command, _, rest = line.partition(" ")
    if command not in COMMANDS:
        near = get_close_matches(command, COMMANDS, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise InputError(
            f"{command} is no command.{hint} /help lists them; a text that starts with / is typed with //."
        )
    return COMMANDS[command](loop, rest.strip())


def _print_answer(loop: ChatLoop, name: str, pieces: Iterator[str]) -> None:
    with closing(pieces):  # type: ignore[type-var]
        try:
            loop.screen.answer(name, pieces)
        except KeyboardInterrupt:
            loop.screen.info("(stopped; the part that was printed is kept)")


def _adapter(loop: ChatLoop, names: str) -> None:
    switch = loop.session.switch
    if names:
        _switch_adapter(loop, names)
    active = switch.active or BASE
    labels = [f"{name}{' *' if name == active else ''}" for name in (BASE, *switch.names)]
    if active not in (BASE, *switch.names):
        labels.append(f"{active} *")
    loop.screen.info("adapters: " + ", ".join(labels))


def _switch_adapter(loop: ChatLoop, names: str) -> None:
    switch, terms = loop.session.switch, names.split()
    if len(terms) == 1 and ":" not in names:
        return switch.activate(None if names == BASE else names)
    weights: dict[str, float] = {}
    for term in terms:
        name, _, weight = term.partition(":")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            raise InputError(f"/adapter: found {term!r}, allowed: NAME:WEIGHT, as in polite:0.5.") from None
    return switch.mix(weights)


def _compare(loop: ChatLoop, text: str) -> None:
    session = loop.session
    if session.switch.active is None:
        names = ", ".join(session.switch.names) or "none is loaded"
        raise InputError(f"/compare: no adapter is active. Use /adapter NAME first ({names}).")
    adapter = session.switch.active
    if text:
        session.attempts = 0
        _print_answer(loop, BASE, session.answer_once([*session.messages, Message("user", text)], base=True))
        return _print_answer(loop, adapter, session.answer(text))
    messages = session.prompt_messages()
    _print_answer(loop, BASE, session.answer_once(messages, base=True))
    return _print_answer(loop, adapter, session.answer_once(messages, base=False))


def _system(loop: ChatLoop, text: str) -> None:
    loop.session.system = text
    loop.screen.info("system prompt set" if text else "no system prompt")


def _reset(loop: ChatLoop, _: str) -> None:
    loop.session.reset()
    loop.screen.info("conversation cleared")


def _retry(loop: ChatLoop, _: str) -> None:
    pieces = loop.session.retry()
    if loop.session.temperature == 0:
        loop.screen.info("at temperature 0 the answer is always the same; --temperature 0.7 gives another")
    _print_answer(loop, "", pieces)


def _save(loop: ChatLoop, file: str) -> None:
    count = loop.session.save(file)
    loop.screen.info(f"saved as record {count} of {file}")


def _help(loop: ChatLoop, _: str) -> None:
    loop.screen.info(HELP)


def _exit(loop: ChatLoop, _: str) -> None:
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
