"""The trained adapter of a run that fails after its last step: kept in a folder of its own, marked as suspect.

The run folder stays unfinished: it has no run.json. `suspect-adapter/` is an adapter folder like any other, with the
error in reason.json; whether it can be used depends on that error.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora.errors import QloraError
from qlora.runs.artifacts import SUSPECT
from qlora.runs.write_artifacts import RunSetup, write_trained
from qlora.training.checkpoint import Position
from qlora.training.run_log import Log
from qlora.utils.atomic_files import write_json
from qlora.utils.atomic_folders import atomic_folder

REASON = "reason.json"


@contextmanager
def kept_as_suspect(setup: RunSetup, position: Position, log: Log) -> Iterator[None]:
    """Save what was trained if the block fails, and say where; the error is raised again."""
    try:
        yield
    except Exception as error:
        if setup.processes.writes:
            try:
                folder = save_suspect(setup, position, error)
                log.print(f"the run failed after its last step; what it trained is kept in {folder}, as suspect")
            except (QloraError, OSError) as other:  # a full disk, or values that are not finite
                log.print(f"the run failed after its last step, and what it trained can't be kept: {other}")
        raise


def save_suspect(setup: RunSetup, position: Position, error: Exception) -> Path:
    """Write the trained weights, and why they are suspect; returns the folder."""
    folder = Path(setup.recipe.train.output) / SUSPECT
    with atomic_folder(folder) as partial:
        write_trained(setup, partial)
        write_json(partial / REASON, {"error": f"{type(error).__name__}: {error}", "step": position.step})
    return folder
