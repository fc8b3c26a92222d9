"""`qlora chat`: a conversation with a run, at a terminal or through a pipe."""

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from qlora.cli.app import QUANT_HELP, app, log

if TYPE_CHECKING:
    from qlora.runs.conversation import ChatSession


@app.command()
def chat(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run's folder, a checkpoint, or a model")],
    adapter: Annotated[list[str] | None, typer.Option(metavar="NAME=PATH", help="more adapters to switch to")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer, in tokens")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy")] = 0.7,
    quant: Annotated[str | None, typer.Option(help=QUANT_HELP)] = None,
) -> None:
    """Chat with a run: streamed answers, /adapter to switch, /compare with the base model, /help for more.

    Example: qlora chat runs/example --adapter brief=runs/brief
    """
    from qlora.runs.adapter_names import named_adapters
    from qlora.runs.find_run import find_run, require_adapters

    files = find_run(run, None, log, quant)
    own = str(files.adapter) if files.adapter else None
    adapters = require_adapters(named_adapters(adapter or [], own))
    from qlora.runs.chat import run_chat
    from qlora.runs.conversation import ChatSession
    from qlora.runs.load_run import load_with_adapters

    loaded, switch = load_with_adapters(files, adapters, log)
    session = ChatSession(loaded, switch, max_new_tokens, temperature, log)
    interactive = sys.stdin.isatty()
    if interactive:
        log(f"{run}: {switch.active or 'the base model'} answers. /help lists the commands, Ctrl-D exits.")
    run_chat(session, Terminal(session, interactive), _input_lines() if interactive else sys.stdin)


class Terminal:
    """Prints streamed answers on stdout; if interactive, their speed on stderr."""

    def __init__(self, session: "ChatSession", interactive: bool) -> None:
        self.session, self.interactive = session, interactive

    def answer(self, name: str, pieces: Iterator[str]) -> None:
        """Print an answer piece by piece after the adapter's name; end the line even if an error occurs."""
        started = time.monotonic()
        try:
            if name:
                typer.echo(f"{name}: ", nl=False)
            for piece in pieces:
                typer.echo(piece, nl=False)
        finally:
            typer.echo()
        if self.interactive:
            rate = self.session.answer_tokens / max(1e-9, time.monotonic() - started)
            log(f"({self.session.answer_tokens} tokens, {rate:.1f} tokens/s)")

    def info(self, text: str) -> None:
        """Print a line about the conversation."""
        log(text)


def _input_lines() -> Iterator[str]:
    """Lines as they are typed; Ctrl-C drops a line, Ctrl-D ends."""
    import readline

    readline.set_auto_history(True)
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            log("\n(Ctrl-D or /exit exits)")
        except EOFError:
            log("")
            return
