"""A wrong value in plain words: what was found, what is allowed, where; from the JSON schema of the section."""

import json
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
UNSAID: Schema = {"type": "null", "title": "not said"}  # null where a setting may be left out, rather than a value
LONGEST = 60  # letters of a found text that are shown


def shown(value: Any) -> str:
    """A value as an error shows it: `'four' (text)`, `2.5`, `null`, `a list`."""
    if isinstance(value, str):
        text = value if len(value) <= LONGEST else value[:LONGEST] + "..."
        return f"{text!r} (text)"
    if value is None or isinstance(value, (bool, int, float)):
        return json.dumps(value)
    if isinstance(value, (list, tuple)):
        return "a list"
    return "a group of settings" if isinstance(value, Mapping) else f"a {type(value).__name__}"


def allowed(schema: Schema, named: Mapping[str, Schema]) -> str:
    """What a JSON schema allows: `auto or a whole number >= 0`."""
    if "anyOf" in schema:
        return _either(way for each in schema["anyOf"] if each != UNSAID for way in allowed(each, named).split(" or "))
    if "$ref" in schema:
        return f"a group of {', '.join(_target(schema, named)['properties'])}"
    if "const" in schema or "enum" in schema:
        return _either(str(word) for word in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return _list(schema, named)
    if schema.get("type") == "string" and "examples" in schema:
        return f"a text such as {', '.join(schema['examples'])}"
    limits = [f" {sign} {schema[name]:.12g}" for name, sign in LIMITS.items() if name in schema]
    return TYPES[schema.get("type", "object")] + " and".join(limits)


def problems(error: Mapping[str, Any], schema: Schema) -> list[tuple[Path, str]]:
    """One of pydantic's errors as `(path, text)`; a clash has one for each setting of it."""
    loc, trouble = error["loc"], error["type"]
    if trouble == "missing" and isinstance(loc[-1], int):
        loc, trouble = loc[:-1], "too_short"
    path, here, beside = _walk(loc, schema)
    name = str(loc[-1]) if loc else ""
    match trouble:
        case "clash":
            return [((*path, *key.split(".")), text) for key, text in error["ctx"]["clashes"].items()]
        case "missing":
            such = f", for example {here['examples'][0]}" if "examples" in here else ""
            return [(path, f"missing: {here['description']}{such}.")]
        case "extra_forbidden":
            return [((*path, name), f"not a setting.{did_you_mean(name, beside)}")]
        case "value_error":
            return [(path, str(error["ctx"]["error"]))]
        case "too_long" | "too_short":
            return [(path, f"a list of the wrong length, allowed: {allowed(here, schema.get('$defs', {}))}.")]
    return [(path, f"found {shown(error['input'])}, allowed: {allowed(here, schema.get('$defs', {}))}.")]


def _walk(loc: Iterable[str | int], schema: Schema) -> tuple[Path, Schema, list[str]]:
    """Follow pydantic's `loc` as far as it names settings: the path, its schema, the settings beside it."""
    named: Mapping[str, Schema] = schema.get("$defs", {})
    path: Path = ()
    here, beside = schema, [*schema.get("properties", {})]
    for step in loc:
        ways = [_target(way, named) for way in here.get("anyOf", [here])]
        beside = [name for way in ways for name in way.get("properties", {})]
        inner = [found for way in ways if (found := _step(way, step)) is not None]
        if not inner:
            break
        here, path = inner[0], (*path, step)
    return path, here, beside


def _step(schema: Schema, step: str | int) -> Schema | None:
    if isinstance(step, int):
        among = schema.get("prefixItems", [])
        return among[step] if 0 <= step < len(among) else schema.get("items")
    found = schema.get("properties", {}).get(step)
    others = schema.get("additionalProperties")
    return others if found is None and isinstance(others, dict) else found


def _target(schema: Schema, named: Mapping[str, Schema]) -> Schema:
    return named[schema["$ref"].rsplit("/", 1)[1]] if "$ref" in schema else schema


def _either(ways: Iterable[str]) -> str:
    *first, last = dict.fromkeys(ways)
    return f"{', '.join(first)} or {last}" if first else last


def _list(schema: Schema, named: Mapping[str, Schema]) -> str:
    if "prefixItems" in schema:
        return f"a list of {len(schema['prefixItems'])}, each {allowed(schema['prefixItems'][0], named)}"
    return "a list of such" if "anyOf" in schema["items"] else f"a list, each {allowed(schema['items'], named)}"
