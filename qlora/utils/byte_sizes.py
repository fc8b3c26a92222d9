"""Sizes as users write them: `24GiB`, `512MB`, or a share such as `5%` of something."""

import re

from qlora.errors import InputError

UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
SIZE = rf"^(0*[1-9]\d{{0,9}}(\.\d{{1,9}})?|0?\.\d*[1-9]\d{{0,9}}) ?({'|'.join(UNITS)})$"
PERCENT = r"^(0*[1-9]\d{0,2}(\.\d{1,9})?|0*\.\d*[1-9]\d{0,9}) ?%$"


def size_bytes(text: str) -> int:
    """The bytes of `24GiB` (2**30), `24GB` (10**9), `512MiB` ... InputError for any other text."""
    if not re.match(SIZE, text) or len(text) > 30:
        raise InputError(f"size: found {text[:60]!r}, allowed: a number with {', '.join(UNITS)}, such as 24GiB.")
    number, unit = re.split(r" ?(?=[KMGT])", text, maxsplit=1)
    return int(float(number) * UNITS[unit])


def share_bytes(value: float | str, whole: int) -> int:
    """The bytes of a share of `whole` (0.05, `5%`), of a number of bytes above 1, or of a size such as `200MiB`."""
    if isinstance(value, str):
        return int(float(value.rstrip("% ")) / 100 * whole) if value.endswith("%") else size_bytes(value)
    return int(value * whole) if value <= 1 else int(value)
