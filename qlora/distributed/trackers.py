"""The trackers of a run, opened and closed through Accelerate, without what the local ones print."""

import io
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from qlora.utils.redact import redacted, redacted_values

PROJECT = "qlora"  # unless WANDB_PROJECT names another: the runs of a project share a dashboard
NAMED = ("wandb", "trackio")  # take the name of a run beside that of its project
VIEWERS = {  # of the trackers that write to this machine: how to look at a run
    "tensorboard": "tensorboard --logdir {folder}",
    "trackio": "trackio show --project {project}",
}


def start_trackers(accelerator: Accelerator, folder: Path, settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Open the trackers of the run in `folder`; returns how to look at it. `settings`: section -> key -> value."""
    project = os.environ.get("WANDB_PROJECT") or PROJECT
    flat = {f"{group}.{key}": str(value) for group, values in settings.items() for key, value in values.items()}
    options = {tracker: {"name": redacted(folder.name)} for tracker in NAMED}
    with _clean_stdout(accelerator):
        accelerator.init_trackers(project, redacted_values(flat), options)
    viewers = [VIEWERS[name] for name in _names(accelerator) if name in VIEWERS]
    return [viewer.format(folder=folder, project=project) for viewer in viewers]


def end_trackers(accelerator: Accelerator) -> None:
    """Close the trackers, and the process group."""
    library = sys.modules.get("trackio")
    with _clean_stdout(accelerator):
        accelerator.end_training()
        if library and accelerator.is_main_process and "trackio" in _names(accelerator):
            library.finish()  # else the library ends the run once more when the process exits, and prints so


def _names(accelerator: Accelerator) -> list[str]:
    return [str(tracker) for tracker in accelerator.log_with]


@contextmanager
def _clean_stdout(accelerator: Accelerator) -> Iterator[None]:
    """Stdout is for programs: what a library prints goes to stderr, and nowhere if all trackers are local."""
    is_local = {*_names(accelerator)} <= {*VIEWERS}
    with redirect_stdout(io.StringIO() if is_local else sys.stderr):
        yield
