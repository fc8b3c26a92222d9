"""HTML that its content can't break: everything that is not `Markup` is escaped when it is put into a tag."""

from collections.abc import Iterable
from html import escape

VOID = frozenset({"br", "col", "hr", "input", "meta"})
_UNPRINTABLE = (*range(0x20), *range(0x7F, 0xA0), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF)
_CLEAN = {code: 0x2400 + code if code < 0x20 else 0xFFFD for code in _UNPRINTABLE if chr(code) not in "\n\t"}


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def text(value: object) -> Markup:
    """`value` as HTML text: escaped, control characters visible, lone surrogates replaced; Markup is not changed."""
    return value if isinstance(value, Markup) else Markup(escape(str(value).translate(_CLEAN), quote=True))


def join(items: Iterable[object]) -> Markup:
    """Several pieces, one after the other; None is left out."""
    return Markup("".join(text(item) for item in items if item is not None))


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """One element. `class_` is the attribute class, `_` in a name becomes `-`, None is left out."""
    values = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    head = name + "".join(f' {key}="{text(value)}"' for key, value in values.items())
    return Markup(f"<{head}>") if name in VOID else Markup(f"<{head}>{join(children)}</{name}>")
