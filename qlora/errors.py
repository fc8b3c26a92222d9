"""The error tree, and the exit code of each error.

QloraError                    1   the run failed
├── InputError                2   the input is wrong; the message says where, what was found, what to do
│   ├── RecipeError               a recipe or an override
│   ├── DataError                 a data file or its records
│   ├── BaseModelError            the folder or hub repository of the base model
│   └── AdapterError              an adapter's settings or files
├── DoesNotFit                3   the memory plan exceeds the budget
├── Stopped             130/143   SIGINT or SIGTERM, after an exact checkpoint was written
└── ReportedByOtherRank  its own  another rank has already printed the error; this one exits silently with its code
"""

from collections.abc import Iterable
from difflib import get_close_matches


class QloraError(Exception):
    """An error that the user reads as one clear message, not as a stack trace."""

    exit_code = 1


class InputError(QloraError):
    """The input is wrong: recipe, data, base model, adapter or arguments."""

    exit_code = 2


class RecipeError(InputError):
    """A recipe or an override is not valid."""


class DataError(InputError):
    """A data file, or a record of it, can't be trained on."""


class BaseModelError(InputError):
    """The base model's folder or repository can't be used."""


class AdapterError(InputError):
    """An adapter's settings or files are not valid."""


class DoesNotFit(QloraError):
    """The memory plan exceeds the budget."""

    exit_code = 3


class Stopped(QloraError):
    """The run ended on a signal, after it wrote an exact checkpoint."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class ReportedByOtherRank(QloraError):
    """Another rank has already printed the error; this one exits silently with its code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("")
        self.exit_code = exit_code


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """End of an error message: ` Did you mean 'nf4'? Known: fp4, nf4.` The question only if a known name is near."""
    names = sorted(known)
    near = get_close_matches(name, names, n=1, cutoff=0.6)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{hint} Known: {', '.join(names)}."


def first_line(error: object, characters: int = 160) -> str:
    """The first line of another library's error, the second too if it ends in a colon; its type if it has no text."""
    lines = [line.strip() for line in (str(error).strip() or type(error).__name__).splitlines()]
    text = f"{lines[0]} {lines[1]}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
    return text[:characters]
