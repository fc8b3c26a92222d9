"""Quantities that keep their number until it is known beside which others they stand: a row of a table has one unit."""

from collections.abc import Sequence

from qlora.runs.report import number_format


class Quantity(float):
    """A value with a unit; as text by itself it takes the unit that suits it."""


class Size(Quantity):
    """Bytes."""

    def __str__(self) -> str:
        return number_format.size(float(self))


class Duration(Quantity):
    """Seconds."""

    def __str__(self) -> str:
        return number_format.duration(float(self))


class Energy(Quantity):
    """Joules."""

    def __str__(self) -> str:
        return number_format.energy(float(self))


LADDERS = {
    Size: (*number_format.UNITS, ("bytes", 1)),
    Duration: (("h", 3600), ("min", 60), ("s", 1)),
    Energy: (("kWh", 3.6e6), ("Wh", 3600), ("J", 1)),
}
Value = str | Quantity


def alike(values: Sequence[Value]) -> list[str]:
    """The values of one row as text: all of one kind in the unit of the largest, so that they can be compared."""
    kinds = {type(value) for value in values if value != ""}
    if len(kinds) != 1 or not kinds & LADDERS.keys() or sum(value != "" for value in values) < 2:
        return [str(value) for value in values]
    ladder = LADDERS[kinds.pop()]  # type: ignore[index]
    most = max(abs(float(value)) for value in values if value != "")
    unit, one = next(((name, each) for name, each in ladder if most >= each), ladder[-1])
    return ["" if value == "" else f"{float(value) / one:,.2f} {unit}" for value in values]
