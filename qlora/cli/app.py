"""The command-line program: options, error handling, output.  Only this package imports typer.

People read stderr, programs read stdout. Nothing heavy is imported before a command needs it.
"""

import json
import sys
import traceback
from errno import EACCES, EISDIR, ELOOP, ENAMETOOLONG, ENOENT, ENOTDIR, EPERM
from typing import Any

import typer
from typer.exceptions import TyperException

from qlora.errors import QloraError, ReportedByOtherRank, first_line
from qlora.utils.cuda_allocator import use_expandable_segments
from qlora.utils.out_of_memory import is_out_of_memory
from qlora.utils.redact import RedactedStream, redacted

app = typer.Typer(
    name="qlora",
    help="Fine-tune large language models on a frozen 4-bit base model.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

# Commands on a recipe take any `key=value`, `--key value` or `--key=value` after it.
WITH_OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
# Errors of the system about a path that can't be read: the input is wrong.
WRONG_PATHS = {EACCES, EISDIR, ELOOP, ENAMETOOLONG, ENOENT, ENOTDIR, EPERM}
TRAINING = ("train", "sweep", "demo")  # commands that train
QUANT_HELP = "storage of the base: nf4 | fp4 | dense (16 bits); default: as trained, an exported model as it is written"
INTERRUPTED = 130  # exit code of a program ended by Ctrl-C


def log(text: str) -> None:
    """Print a line for people on stderr, redacted."""
    typer.echo(redacted(text), err=True)


def print_json(value: Any) -> None:
    """Print the one JSON object for programs on stdout."""
    typer.echo(json.dumps(value, ensure_ascii=False, allow_nan=False, default=str))


def run(arguments: list[str]) -> int:
    """Run the program; returns its exit code. An error is one line; --debug prints the stack trace before it."""
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        code = typer.main.get_command(app).main(args=arguments, prog_name="qlora", standalone_mode=False)
    except QloraError as error:
        return _report(error, debug)
    except TyperException as error:
        if not arguments:
            error.show()  # type: ignore[attr-defined]
        else:
            log(f"error: {error.format_message()} See `qlora {arguments[0]} --help`.")
        return 2
    except Exception as error:
        if debug:
            log(traceback.format_exc())
        log(f"error: {_unexpected(error)}")
        return 2 if isinstance(error, OSError) and error.errno in WRONG_PATHS else 1
    if code == INTERRUPTED:
        log("stopped before the first step; nothing was written" if arguments[0] in TRAINING else "stopped")
    return code if isinstance(code, int) else 0


def _unexpected(error: Exception) -> str:
    """The message of an error that no package has turned into one of its own."""
    if is_out_of_memory(error):
        return (
            f"out of memory ({first_line(error)}). Close other programs on this device, give shorter texts, or set "
            "memory.weights: stream in the recipe."
        )
    if isinstance(error, OSError) and error.filename is not None:
        return f"{str(error.filename)[:200]}: {error.strerror}. Correct the path or its permissions."
    return f"{type(error).__name__}: {error}\nThis is a bug in qlora; --debug prints the stack trace."


def _report(error: QloraError, debug: bool) -> int:
    """Print an error, unless another rank has; returns its exit code."""
    if debug:
        log(traceback.format_exc())
    if not isinstance(error, ReportedByOtherRank):
        log(f"error: {error}")
    return error.exit_code


def main() -> None:
    """The `qlora` command. Output of other libraries on stderr is redacted too."""
    sys.stderr = RedactedStream(sys.stderr)  # type: ignore[assignment]
    use_expandable_segments()
    sys.exit(run(sys.argv[1:]))
