"""The packages of the trackers in `train.report_to`: a run needs them, and Accelerate does without those it lacks."""

from collections.abc import Sequence
from importlib.util import find_spec

OTHER_MODULES = {"tensorboard": "tensorboardX"}  # that write the same tracker's files
PACKAGES = {"comet_ml": "comet-ml"}  # names on the package index that are not the tracker's


def missing_packages(trackers: Sequence[str]) -> list[str]:
    """The names on the package index of those trackers' packages that are not installed."""
    modules = {tracker: {tracker, OTHER_MODULES.get(tracker, tracker)} for tracker in trackers}
    missing = [tracker for tracker, names in modules.items() if all(find_spec(name) is None for name in names)]
    return [PACKAGES.get(tracker, tracker) for tracker in missing]
