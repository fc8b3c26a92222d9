"""Notes on kernels that a machine does not run, kept until there is a log: a slower one then runs without an error."""

_notes: list[str] = []


def note_kernel(line: str) -> None:
    """Keep a line for the log."""
    _notes.append(line)


def take_kernel_notes() -> list[str]:
    """The lines kept since the last call, each once."""
    lines = list(dict.fromkeys(_notes))
    _notes.clear()
    return lines
