"""Error messages for wrong values: where, what was found, what is allowed; from the JSON schema of the section."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from qlora.config.locations import Path
from qlora.errors import did_you_mean

Schema = dict[str, Any]  # a JSON schema

TYPES = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "text",
    "null": "null",
    "object": "a group of settings",
}
LIMITS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
UNSET: Schema = {"type": "null", "title": "not set"}  # null that means "not set", not a value of the setting
MAX_TEXT_CHARS = 60  # of a text that are shown


def shown(value: Any) -> str:
    """A value as an error shows it: `'four' (text)`, `2.5`, `null`, `a list`."""
    if isinstance(value, str):
        text = value if len(value) <= MAX_TEXT_CHARS else value[:MAX_TEXT_CHARS] + "..."
        return f"{text!r} (text)"
    if value is None or isinstance(value, (bool, int, float)):
        return json.dumps(value)
    if isinstance(value, (list, tuple)):
        return "a list"
    return "a group of settings" if isinstance(value, Mapping) else f"a {type(value).__name__}"


def allowed(schema: Schema, definitions: Mapping[str, Schema]) -> str:
    """What a JSON schema allows: `auto or a whole number >= 0`."""
    if "anyOf" in schema:
        options = [option for option in schema["anyOf"] if option != UNSET]
        return _either(text for option in options for text in allowed(option, definitions).split(" or "))
    if "$ref" in schema:
        return f"a group of {', '.join(_resolve(schema, definitions)['properties'])}"
    if "const" in schema or "enum" in schema:
        return _either(str(word) for word in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return _list(schema, definitions)
    if schema.get("type") == "string" and "examples" in schema:
        return f"a text such as {', '.join(schema['examples'])}"
    limits = [f" {sign} {schema[name]:.12g}" for name, sign in LIMITS.items() if name in schema]
    return TYPES[schema.get("type", "object")] + " and".join(limits)


def problems(error: Mapping[str, Any], schema: Schema) -> list[tuple[Path, str]]:
    """One of pydantic's errors as `(path, text)`; a conflict has one for each of its settings."""
    loc, kind = error["loc"], error["type"]
    if kind == "missing" and isinstance(loc[-1], int):
        loc, kind = loc[:-1], "too_short"
    path, inner, siblings = _follow(loc, schema)
    name = str(loc[-1]) if loc else ""
    match kind:
        case "conflict":
            return [((*path, *key.split(".")), text) for key, text in error["ctx"]["conflicts"].items()]
        case "missing":
            example = f", for example {inner['examples'][0]}" if "examples" in inner else ""
            return [(path, f"missing: {inner['description']}{example}.")]
        case "extra_forbidden":
            return [((*path, name), f"not a setting.{did_you_mean(name, siblings)}")]
        case "value_error":
            return [(path, str(error["ctx"]["error"]))]
        case "too_long" | "too_short":
            return [(path, f"a list of the wrong length, allowed: {allowed(inner, schema.get('$defs', {}))}.")]
    expected = allowed(inner, schema.get("$defs", {}))
    return [(path, f"found {shown(error['input'])}, allowed: {expected}.{_remedy(error['input'], expected)}")]


def _remedy(value: Any, expected: str) -> str:
    """What to write instead of a value whose YAML means something else than the user does."""
    if isinstance(value, bool | int | float) and TYPES["string"] in re.split(r", | or ", expected):
        return " Text that looks like a number or a truth value needs quotes, on the command line both: '\"12e5\"'."
    if isinstance(value, str) and "," in value and "a list" in expected:
        return f" A list is written in brackets: [{value[:MAX_TEXT_CHARS]}]."
    return ""


def _follow(loc: Iterable[str | int], schema: Schema) -> tuple[Path, Schema, list[str]]:
    """Follow pydantic's `loc` as far as it names settings: the path, its schema, the settings of the same group."""
    definitions: Mapping[str, Schema] = schema.get("$defs", {})
    path: Path = ()
    inner, siblings = schema, [*schema.get("properties", {})]
    for step in loc:
        options = [_resolve(option, definitions) for option in inner.get("anyOf", [inner])]
        siblings = [name for option in options for name in option.get("properties", {})]
        children = [child for option in options if (child := _child(option, step)) is not None]
        if not children:
            break
        inner, path = children[0], (*path, step)
    return path, inner, siblings


def _child(schema: Schema, step: str | int) -> Schema | None:
    if isinstance(step, int):
        items = schema.get("prefixItems", [])
        return items[step] if 0 <= step < len(items) else schema.get("items")
    child = schema.get("properties", {}).get(step)
    additional = schema.get("additionalProperties")
    return additional if child is None and isinstance(additional, dict) else child


def _resolve(schema: Schema, definitions: Mapping[str, Schema]) -> Schema:
    return definitions[schema["$ref"].rsplit("/", 1)[1]] if "$ref" in schema else schema


def _either(options: Iterable[str]) -> str:
    *first, last = dict.fromkeys(options)
    return f"{', '.join(first)} or {last}" if first else last


def _list(schema: Schema, definitions: Mapping[str, Schema]) -> str:
    if "prefixItems" in schema:
        return f"a list of {len(schema['prefixItems'])}, each {allowed(schema['prefixItems'][0], definitions)}"
    return "a list of these" if "anyOf" in schema["items"] else f"a list, each {allowed(schema['items'], definitions)}"
