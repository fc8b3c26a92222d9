"""The tasks of `qlora eval`, and the check of an option that names one. Imports no torch."""

from qlora.errors import InputError, did_you_mean

TASKS = ("loss", "exact-match", "choice", "preference")


def require_task(task: str) -> None:
    """InputError, with the nearest name, for a task that does not exist."""
    if task not in TASKS:
        raise InputError(f"--task: no {task!r}.{did_you_mean(task, TASKS)}")
