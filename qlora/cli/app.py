"""The command line's frame: the program, how errors end it, who reads what.  Door: typer.

People read stderr; programs read stdout.  Nothing heavy is imported before a verb needs it.
"""

import json
import sys
import traceback
from typing import Any

import typer
from typer.exceptions import TyperException

from qlora.errors import QloraError, ReportedByOtherRank
from qlora.utils.redact import RedactedStream, redacted

app = typer.Typer(
    name="qlora",
    help="Fine-tune large language models on a frozen 4-bit base, with every promise measured.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

# Verbs on a recipe take any `key=value`, `--key value` or `--key=value` after it.
WITH_OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}


INTERRUPTED = 130  # exit code of a program ended by Ctrl-C


def say(text: str) -> None:
    """A line for people, secrets taken out."""
    typer.echo(redacted(text), err=True)


def answer(value: Any) -> None:
    """The one JSON object that a program reads."""
    typer.echo(json.dumps(value, ensure_ascii=False, allow_nan=False, default=str))


def run(arguments: list[str]) -> int:
    """Run the program; returns its exit code. A mistake is one line; --debug puts the stack trace before it."""
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        code = typer.main.get_command(app).main(args=arguments, prog_name="qlora", standalone_mode=False)
    except QloraError as error:
        return _told(error, debug)
    except TyperException as error:
        if not arguments:
            error.show()  # type: ignore[attr-defined]
        else:
            say(f"error: {error.format_message()} See `qlora {arguments[0]} --help`.")
        return 2
    except Exception as error:
        if debug:
            say(traceback.format_exc())
        say(f"error: {type(error).__name__}: {error}\nThis is qlora's mistake, not yours; --debug shows where it is.")
        return 1
    if code == INTERRUPTED:
        say("stopped before the first step; nothing was written")
    return code if isinstance(code, int) else 0


def _told(error: QloraError, debug: bool) -> int:
    """A mistake said, by one process for all; its exit code."""
    if debug:
        say(traceback.format_exc())
    if not isinstance(error, ReportedByOtherRank):
        say(f"error: {error}")
    return error.exit_code


def main() -> None:
    """The `qlora` command. What other libraries say on stderr is redacted too."""
    sys.stderr = RedactedStream(sys.stderr)  # type: ignore[assignment]
    sys.exit(run(sys.argv[1:]))
