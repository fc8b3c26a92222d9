"""`qlora chat`: talk to a run at the terminal, or through a pipe."""

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from qlora.cli.app import app, say

if TYPE_CHECKING:
    from qlora.runs.conversation import ChatSession


@app.command()
def chat(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run's folder, a checkpoint, or a model")],
    adapter: Annotated[list[str] | None, typer.Option(metavar="NAME=PATH", help="more adapters to switch to")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer, in tokens")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy")] = 0.7,
) -> None:
    """Talk to a run: answers as they come, /adapter to switch, /compare to see the base beside it, /help for more.

    Example: qlora chat runs/example --adapter brief=runs/brief
    """
    from qlora.runs.adapter_names import named_adapters
    from qlora.runs.chat import converse
    from qlora.runs.conversation import ChatSession
    from qlora.runs.load_run import load_with_adapters, own_adapter

    opened, switch = load_with_adapters(run, named_adapters(adapter or [], own_adapter(run)), say)
    talk = ChatSession(opened, switch, max_new_tokens, temperature, say)
    typed = sys.stdin.isatty()
    if typed:
        say(f"{run}: {switch.name or 'the base alone'} answers. /help lists the commands, Ctrl-D leaves.")
    converse(talk, Terminal(talk, typed), _typed() if typed else sys.stdin)


class Terminal:
    """Answers on stdout as they come; for a person, their speed on stderr."""

    def __init__(self, talk: "ChatSession", typed: bool) -> None:
        self.talk, self.typed = talk, typed

    def answer(self, who: str, pieces: Iterator[str]) -> None:
        """Print an answer piece by piece, and end its line whatever happens."""
        started = time.monotonic()
        try:
            if who:
                typer.echo(f"{who}: ", nl=False)
            for piece in pieces:
                typer.echo(piece, nl=False)
        finally:
            typer.echo()
        if self.typed:
            rate = self.talk.tokens / max(1e-9, time.monotonic() - started)
            say(f"({self.talk.tokens} tokens, {rate:.1f} tokens/s)")

    def notice(self, text: str) -> None:
        """A line for people."""
        say(text)


def _typed() -> Iterator[str]:
    """Lines as a person types them; Ctrl-C drops a line, Ctrl-D ends."""
    import readline

    readline.set_auto_history(True)
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            say("\n(Ctrl-D or /exit leaves)")
        except EOFError:
            say("")
            return
