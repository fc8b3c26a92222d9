"""The `qlora` command line, called in the test process."""

import contextlib
import io
import json
from typing import Any, NamedTuple

from qlora.cli.app import run as run_cli


class CommandResult(NamedTuple):
    """Exit code and output of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON object on stdout."""
        assert self.code == 0, self.err
        assert self.out.count("\n") == 1 and self.out.endswith("\n"), "more than one line on stdout"
        return json.loads(self.out)


def qlora(*arguments: object) -> CommandResult:
    """Run `qlora ARGUMENTS`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = run_cli([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
    return CommandResult(code, out.getvalue(), err.getvalue())
