"""The error tree: what can go wrong, and the exit code each kind of trouble ends with.

QloraError                 1   the run failed
├── InputError             2   what the user gave is wrong; the message says where, what was found, what to do
│   ├── RecipeError            a recipe or an override
│   ├── DataError              a data file or its rows
│   ├── BaseModelError         the folder or hub repository of the base model
│   ├── AdapterError           an adapter's settings or files
│   └── NotBuiltYet            a part that is promised but not there yet
├── DoesNotFit             3   the memory plan exceeds the budget
├── Stopped          130/143   SIGINT or SIGTERM, after an exact checkpoint was written
└── SaidElsewhere      as it   another process of the run has said what is wrong
"""

from collections.abc import Iterable
from difflib import get_close_matches


class QloraError(Exception):
    """Anything the user should read as one clear message rather than as a stack trace."""

    exit_code = 1


class InputError(QloraError):
    """What the user gave is wrong: recipe, data, base, adapter or arguments."""

    exit_code = 2


class RecipeError(InputError):
    """A recipe or an override says something that can't be meant."""


class DataError(InputError):
    """A data file, or a row of it, can't be trained on."""


class BaseModelError(InputError):
    """The base model's folder or repository is not what is needed."""


class AdapterError(InputError):
    """An adapter's settings or files don't fit."""


class NotBuiltYet(InputError):
    """A promised part that does not exist yet."""


class DoesNotFit(QloraError):
    """The plan needs more memory than there is."""

    exit_code = 3


class Stopped(QloraError):
    """The run ended on a signal after writing an exact checkpoint."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class ReportedByOtherRank(QloraError):
    """Another process of the run says what went wrong; this one ends with the same exit code and no word."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("")
        self.exit_code = exit_code


def did_you_mean(found: str, known: Iterable[str]) -> str:
    """End an error message: ` Did you mean 'nf4'? Known: fp4, nf4.` (only the second half when nothing is near)."""
    names = sorted(known)
    near = get_close_matches(found, names, n=1, cutoff=0.6)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{hint} Known: {', '.join(names)}."
