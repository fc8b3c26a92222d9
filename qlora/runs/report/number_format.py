"""Numbers as text: grouped digits, a unit that suits the size, one notation for each kind of value."""

UNITS = (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def count(value: float) -> str:
    """An integer with grouped thousands: 8,030,261,248."""
    return f"{value:,.0f}"


def loss(value: float) -> str:
    """A loss in nats per token: four decimals, because differences of 0.001 matter."""
    return f"{value:.4f}"


def rate(value: float) -> str:
    """A learning rate or another small factor as in a recipe: 0.0002 -> 2e-4."""
    if value == 0 or 0.01 <= abs(value) < 10_000:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def unit_of(size_bytes: float) -> tuple[str, int]:
    """The binary unit for `size_bytes`, and the bytes of that unit."""
    return next(((name, unit) for name, unit in UNITS if size_bytes >= unit), ("bytes", 1))


def size(value: float) -> str:
    """Bytes in a binary unit: 11.84 GiB."""
    name, unit = unit_of(abs(value))
    return f"{value / unit:,.2f} {name}" if unit > 1 else f"{count(value)} bytes"


def duration(seconds: float) -> str:
    """A time in its two largest units: 2 h 05 min, 3 min 20 s, 8.4 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24:02d} h"


def energy(joules: float) -> str:
    """Energy in kWh, Wh or J: 1.24 kWh, 35.2 Wh, 480 J."""
    if joules >= 3.6e6:
        return f"{joules / 3.6e6:.2f} kWh"
    return f"{joules / 3600:.1f} Wh" if joules >= 3600 else f"{joules:.0f} J"


def share(part: float, total: float) -> str:
    """`part` of `total` in percent; empty if the total is 0."""
    if not total:
        return ""
    percent = 100 * part / total
    return f"{percent:.1f} %" if percent == 0 or abs(percent) >= 0.1 else f"{percent:.2g} %"


def change(before: float, after: float) -> str:
    """The signed difference of `after` from `before` in percent of `before`; empty if that is 0."""
    return f"{(after - before) / abs(before):+.1%}".replace("%", " %").replace("-", "\u2212") if before else ""
