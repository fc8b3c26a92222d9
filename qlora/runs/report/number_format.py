"""How numbers are written for people: grouped digits, units that suit the size, one notation per kind of value."""

UNITS = (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def count(value: float) -> str:
    """A whole number with its thousands grouped: 8,030,261,248."""
    return f"{value:,.0f}"


def loss(value: float) -> str:
    """A loss in nats per token: four decimals, since differences of 0.001 are looked at."""
    return f"{value:.4f}"


def rate(value: float) -> str:
    """A learning rate or another small factor as recipes write it: 0.0002 -> 2e-4."""
    if value == 0 or 0.01 <= abs(value) < 10_000:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def unit_of(most_bytes: float) -> tuple[str, int]:
    """The binary unit that suits `most_bytes`, and its bytes."""
    return next(((name, one) for name, one in UNITS if most_bytes >= one), ("bytes", 1))


def size(value: float) -> str:
    """Bytes in the unit that suits them: 11.84 GiB."""
    name, one = unit_of(abs(value))
    return f"{value / one:,.2f} {name}" if one > 1 else f"{count(value)} bytes"


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
    """Energy in the unit that suits it: 1.24 kWh, 35.2 Wh, 480 J."""
    if joules >= 3.6e6:
        return f"{joules / 3.6e6:.2f} kWh"
    return f"{joules / 3600:.1f} Wh" if joules >= 3600 else f"{joules:.0f} J"


def share(part: float, whole: float) -> str:
    """`part` of `whole` in per cent; nothing if there is no whole."""
    if not whole:
        return ""
    of = 100 * part / whole
    return f"{of:.1f} %" if of == 0 or abs(of) >= 0.1 else f"{of:.2g} %"


def change(before: float, after: float) -> str:
    """How far `after` is from `before`, signed, in per cent of `before`; nothing if that was 0."""
    return f"{(after - before) / abs(before):+.1%}".replace("%", " %").replace("-", "\u2212") if before else ""
