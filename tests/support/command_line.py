"""The command line called in this process, as a user would type it."""

import contextlib
import io
import json
from typing import Any, NamedTuple

from qlora.cli.app import run as run_cli


class Said(NamedTuple):
    """What a command ended with and said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON object on stdout."""
        assert self.code == 0, self.err
        assert self.out.count("\n") == 1 and self.out.endswith("\n"), "more than one line on stdout"
        return json.loads(self.out)


def qlora(*arguments: object) -> Said:
    """`qlora ARGUMENTS`: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = run_cli([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
    return Said(code, out.getvalue(), err.getvalue())
