"""Progress of a long task: how much is done, how fast, how long is left. Reported later and later."""

import time
from collections.abc import Callable

FIRST_SECONDS = 5.0  # shorter tasks report nothing


class ProgressReporter:
    """Logs a line such as `reading the base: 40 % of 15.2 GB, 812 MB/s, 0:11 left`.

    unit: `records`, `tokens`, or `bytes`, which are shown in powers of ten as for disks and networks.
    """

    def __init__(self, log: Callable[[str], None], task: str, unit: str = "records") -> None:
        self._log, self._task, self._unit = log, task, unit
        self._started = time.monotonic()
        self._next_seconds = FIRST_SECONDS

    def __call__(self, done: int, total: int | None = None) -> None:
        """`done` of `total` is done; total None: not known."""
        seconds = time.monotonic() - self._started
        if seconds < self._next_seconds:
            return
        self._next_seconds = seconds + max(FIRST_SECONDS, seconds / 10)
        speed = done / seconds
        if total is None:
            progress, left = f"{self._amount(done)} done", ""
        else:
            progress = f"{100 * done // max(1, total)} % of {self._amount(total)}"
            left = f", {clock((total - done) / max(speed, 1e-9))} left"
        self._log(f"{self._task}: {progress}, {self._amount(speed)}/s{left}")

    def _amount(self, value: float) -> str:
        if self._unit != "bytes":
            return f"{value:,.0f} {self._unit}"
        return f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:,.0f} MB"


def clock(seconds: float) -> str:
    """`0:07`, `12:34`, `3:02:10`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
