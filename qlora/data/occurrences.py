"""A count of records with the places of the first few, for findings about many of them."""

from qlora.data.types import count_of

MAX_LISTED = 5  # locations listed in a finding about many records


class Occurrences:
    """A count of records, and the locations of the first few."""

    def __init__(self) -> None:
        self.count = 0
        self._locations: list[str] = []

    def add(self, where: str) -> None:
        """Count one more record."""
        self.count += 1
        if len(self._locations) <= MAX_LISTED:
            self._locations.append(where)

    def describe(self, text: str) -> str:
        """`text` between the count and the first locations."""
        more = ", ..." if self.count > MAX_LISTED else ""
        return f"{count_of(self.count)} {text} ({', '.join(self._locations[:MAX_LISTED])}{more})"
