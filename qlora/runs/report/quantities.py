"""Quantities with a unit. They stay numbers until a table row is written, so that a row has one unit."""

from collections.abc import Sequence

from qlora.runs.report import number_format


class Quantity(float):
    """A value with a unit; `str` picks the unit that suits the value."""


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


UNITS = {
    Size: (*number_format.UNITS, ("bytes", 1)),
    Duration: (("h", 3600), ("min", 60), ("s", 1)),
    Energy: (("kWh", 3.6e6), ("Wh", 3600), ("J", 1)),
}
Value = str | Quantity


def in_one_unit(values: Sequence[Value]) -> list[str]:
    """The values of a row as text: quantities of one kind in the unit of the largest, so that they can be compared."""
    kinds = {type(value) for value in values if value != ""}
    if len(kinds) != 1 or not kinds & UNITS.keys() or sum(value != "" for value in values) < 2:
        return [str(value) for value in values]
    units = UNITS[kinds.pop()]  # type: ignore[index]
    largest = max(abs(float(value)) for value in values if value != "")
    name, unit = next(((name, unit) for name, unit in units if largest >= unit), units[-1])
    return ["" if value == "" else f"{float(value) / unit:,.2f} {name}" for value in values]
