"""One process on one device."""

from qlora.distributed.processes import Processes


class Single(Processes):
    """No communication."""
