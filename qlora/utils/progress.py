"""How far a long work is, how fast, and how long it will take: not at once, and ever more rarely."""

import time
from collections.abc import Callable

FIRST_SECONDS = 5.0  # works shorter than that say nothing


class ProgressReporter:
    """Told how much is done, says so in a line: `reading the base: 40 % of 15.2 GB, 812 MB/s, 0:11 left`.

    unit: `rows`, `tokens`, or `bytes`, which are told in powers of ten as disks and networks are sold.
    """

    def __init__(self, say: Callable[[str], None], what: str, unit: str = "rows") -> None:
        self._say, self._what, self._unit = say, what, unit
        self._started = time.monotonic()
        self._due_seconds = FIRST_SECONDS

    def __call__(self, done: int, total: int | None = None) -> None:
        """So much is done, of so much in all; None: nobody knows how much there is."""
        seconds = time.monotonic() - self._started
        if seconds < self._due_seconds:
            return
        self._due_seconds = seconds + max(FIRST_SECONDS, seconds / 10)
        speed = done / seconds
        far = f"{self._much(done)} done" if total is None else f"{100 * done // max(1, total)} % of {self._much(total)}"
        left = "" if total is None else f", {clock((total - done) / max(speed, 1e-9))} left"
        self._say(f"{self._what}: {far}, {self._much(speed)}/s{left}")

    def _much(self, value: float) -> str:
        if self._unit != "bytes":
            return f"{value:,.0f} {self._unit}"
        return f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:,.0f} MB"


def clock(seconds: float) -> str:
    """`0:07`, `12:34`, `3:02:10`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
