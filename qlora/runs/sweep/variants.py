"""The variants of a sweep: comma lists and a file of variants -> a named recipe for each combination."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from qlora.config import parse, read_text
from qlora.config.overrides import SOURCE, split_overrides
from qlora.errors import InputError, RecipeError
from qlora.recipe.recipe import Recipe, read
from qlora.runs.sweep.shared_settings import refuse_incompatible

OPENS, CLOSES = "[{(", "]})"
NAME = re.compile(r"\w[\w.+-]*")
RATES_AT_ONCE = 7  # of --find-lr
MAX_VALUE_LENGTH = 40  # characters of a value in a variant's name


@dataclass(frozen=True)
class AxisValue:
    """One value of an axis: its label, and the overrides that set it."""

    label: str
    overrides: tuple[str, ...]
    where: str = SOURCE  # the location that errors name


@dataclass(frozen=True)
class Variant:
    """One run of a sweep: the name of its folder, the settings that are its own, and its complete recipe."""

    name: str
    settings: Mapping[str, str]
    recipe: Recipe
    notes: tuple[str, ...] = ()


def variants_of(path: str, arguments: Sequence[str], file: str | None = None, out: str | None = None) -> list[Variant]:
    """All combinations of the values in comma lists and of the variants in `file`.

    Each has its folder in `out`, or in the recipe's train.output. InputError, with the key, for what can't be swept.
    """
    common, axes = parse_axes(arguments)
    axes = [read_variants(file), *axes] if file else axes
    if not axes:
        raise InputError(
            "nothing to sweep: no setting has several values. Write a comma list, such as adapter.rank=8,16, "
            "or name a file with --variants."
        )
    variants = [_variant(path, common, values, out) for values in product(*axes)]
    names = [variant.name.casefold() for variant in variants]
    duplicate = next((variant.name for variant in variants if names.count(variant.name.casefold()) > 1), None)
    if duplicate is not None:
        raise InputError(f"two variants are called {duplicate!r}. Give each value once, or names with --variants.")
    refuse_incompatible({variant.name: variant.recipe for variant in variants})
    return variants


def rate_variants(path: str, arguments: Sequence[str], file: str | None, out: str | None) -> list[Variant]:
    """Stand-ins for the variants of `--find-lr`, whose rates follow from measurements: for checks and the memory plan.

    Each has its folder in `out`, or in the recipe's train.output. InputError if something else is swept.
    """
    common, axes = parse_axes(arguments)
    if axes or file:
        raise InputError("--find-lr sweeps the learning rate alone. Give each other setting one value.")
    return [_variant(path, common, [AxisValue(f"rate-{number + 1}", ())], out) for number in range(RATES_AT_ONCE)]


def parse_axes(arguments: Sequence[str]) -> tuple[list[str], list[list[AxisValue]]]:
    """The overrides common to all variants, and an axis for each comma list. InputError for an empty value in one."""
    common: list[str] = []
    lists: dict[str, list[str]] = {}
    for key, text in split_overrides(arguments):
        values = [] if text is None else split_values(text)
        if len(values) < 2:
            common.append(key if text is None else f"{key}={text}")
            continue
        if not all(values):
            raise InputError(f"{SOURCE}: {key}: {text!r} has an empty value. Write it as {key}=8,16.")
        lists[key.replace("-", "_")] = values
    leaves = [key.rpartition(".")[2] for key in lists]
    axes = []
    for key, values in lists.items():
        leaf = key.rpartition(".")[2]
        label = key if leaves.count(leaf) > 1 else leaf
        axes.append([AxisValue(f"{label}-{_file_name(value)}", (f"{key}={value}",)) for value in values])
    return common, axes


def split_values(text: str) -> list[str]:
    """The values of a comma list; commas inside brackets or quotes belong to a value."""
    values, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        depth += (character in OPENS) - (character in CLOSES) if not quote else 0
        if character == "," and not depth and not quote:
            values.append("")
        else:
            values[-1] += character
    return [value.strip() for value in values]


def read_variants(file: str) -> list[AxisValue]:
    """A file of variants as an axis. Its lines: `name: {adapter.rank: 8, optim: {learning_rate: 1e-4}}`."""
    document = parse(read_text(file), file)
    if not isinstance(document.value, Mapping) or not document.value or document.problems:
        problems = "; ".join(f"{location}: {text}" for location, text in document.problems)
        raise RecipeError(problems or f"{file}: allowed: lines of `name: {{adapter.rank: 8}}`, one for each variant.")
    axis = []
    for name, settings in document.value.items():
        location = str(document.locations[(name,)])
        if not isinstance(settings, Mapping) or not settings:
            raise RecipeError(f"{location}: allowed: the settings of this variant, such as {{adapter.rank: 8}}.")
        if not NAME.fullmatch(name):
            raise RecipeError(
                f"{location}: the name becomes a folder's name. Allowed: letters, digits, and . _ + - after the first."
            )
        axis.append(AxisValue(name, tuple(_overrides(settings)), f"{location}."))
    return axis


def _overrides(settings: Mapping[str, Any]) -> Iterator[str]:
    for key, value in settings.items():
        if isinstance(value, Mapping) and "." not in key:  # a section of settings
            yield from (f"{key}.{name}={json.dumps(setting)}" for name, setting in value.items())
        else:
            yield f"{key}={json.dumps(value)}"


def _variant(path: str, common: Sequence[str], values: Sequence[AxisValue], out: str | None) -> Variant:
    overrides = [override for value in values for override in value.overrides]
    name = "_".join(value.label for value in values)
    if any(override.startswith("train.output=") for override in overrides):
        raise InputError("train.output: each variant has its own folder in --out, named after its settings.")
    try:
        recipe, notes = read(path, [*common, *overrides])
    except RecipeError as error:
        locations = {value.where for value in values} - {SOURCE}
        text = str(error)
        for location in locations:
            text = text.replace(f"{SOURCE}: ", f"{location}")
        raise RecipeError(text) from None
    output = str(Path(out or recipe.train.output).expanduser() / name)
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"output": output})})
    settings = dict(override.split("=", 1) for override in overrides)
    return Variant(name, settings, recipe, tuple(notes))


def _file_name(value: str) -> str:
    """A value as part of a folder's name."""
    return re.sub(r"[^\w.+-]+", "-", value).strip("-.")[-MAX_VALUE_LENGTH:]
