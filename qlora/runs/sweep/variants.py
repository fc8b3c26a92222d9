"""What a sweep is told: comma lists and a file of variants -> a recipe for each, by name."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from qlora.config import parse, read_text
from qlora.config.overrides import SOURCE, pairs
from qlora.errors import InputError, RecipeError
from qlora.recipe.recipe import Recipe, read
from qlora.runs.sweep.shared_settings import refuse_apart

OPENS, CLOSES = "[{(", "]})"
NAME = re.compile(r"\w[\w.+-]*")
LONGEST = 40  # characters of a value in a name


@dataclass(frozen=True)
class AxisValue:
    """One value of an axis: how it is called, and the overrides that set it."""

    label: str
    overrides: tuple[str, ...]
    where: str = SOURCE  # the place that an error names


@dataclass(frozen=True)
class Variant:
    """One run of a sweep: its folder's name, what was set for it alone, and its whole recipe."""

    name: str
    settings: Mapping[str, str]
    recipe: Recipe
    notes: tuple[str, ...] = ()


def variants_of(path: str, arguments: Sequence[str], file: str | None = None, out: str | None = None) -> list[Variant]:
    """The variants of a recipe: every value of a comma list with every one of the others and of the file's.

    Each has its folder in `out`, or in the recipe's train.output. InputError, with the key, for what can't be swept.
    """
    common, axes = grid(arguments)
    axes = [choices_of(file), *axes] if file else axes
    if not axes:
        raise InputError(
            "nothing to sweep: no setting has several values. Write a comma list, such as adapter.rank=8,16, "
            "or name a file with --variants."
        )
    found = [_variant(path, common, chosen, out) for chosen in product(*axes)]
    names = [variant.name.casefold() for variant in found]
    twice = next((variant.name for variant in found if names.count(variant.name.casefold()) > 1), None)
    if twice is not None:
        raise InputError(f"two variants are called {twice!r}. Give each value once, or names with --variants.")
    refuse_apart({variant.name: variant.recipe for variant in found})
    return found


def grid(arguments: Sequence[str]) -> tuple[list[str], list[list[AxisValue]]]:
    """The overrides that hold for all, and an axis for each comma list. InputError for an empty value in one."""
    common: list[str] = []
    lists: dict[str, list[str]] = {}
    for key, text in pairs(arguments):
        values = [] if text is None else listed(text)
        if len(values) < 2:
            common.append(key if text is None else f"{key}={text}")
            continue
        if not all(values):
            raise InputError(f"{SOURCE}: {key}: {text!r} holds an empty value. Write it as {key}=8,16.")
        lists[key.replace("-", "_")] = values
    leaves = [key.rpartition(".")[2] for key in lists]
    axes = []
    for key, values in lists.items():
        short = key.rpartition(".")[2]
        called = key if leaves.count(short) > 1 else short
        axes.append([AxisValue(f"{called}-{_plain(value)}", (f"{key}={value}",)) for value in values])
    return common, axes


def listed(text: str) -> list[str]:
    """The values of a comma list; commas inside brackets or quotes belong to a value."""
    parts, depth, quote = [""], 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "\"'":
            quote = sign
        depth += (sign in OPENS) - (sign in CLOSES) if not quote else 0
        if sign == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts]


def choices_of(file: str) -> list[AxisValue]:
    """The axis that a file of variants is: `name: {adapter.rank: 8, optim: {learning_rate: 1e-4}}`."""
    document = parse(read_text(file), file)
    if not isinstance(document.value, Mapping) or not document.value or document.problems:
        wrong = "; ".join(f"{place}: {text}" for place, text in document.problems)
        raise RecipeError(wrong or f"{file}: allowed: lines of `name: {{adapter.rank: 8}}`, one a variant.")
    choices = []
    for name, settings in document.value.items():
        place = str(document.places[(name,)])
        if not isinstance(settings, Mapping) or not settings:
            raise RecipeError(f"{place}: allowed: the settings of this variant, such as {{adapter.rank: 8}}.")
        if not NAME.fullmatch(name):
            raise RecipeError(f"{place}: is to be a folder's name. Allowed: letters, digits, and . _ + - in between.")
        choices.append(AxisValue(name, tuple(_overrides(settings)), f"{place}."))
    return choices


def _overrides(settings: Mapping[str, Any]) -> Iterator[str]:
    for key, value in settings.items():
        if isinstance(value, Mapping) and "." not in key:  # a section: the settings in it, one by one
            yield from (f"{key}.{inner}={json.dumps(each)}" for inner, each in value.items())
        else:
            yield f"{key}={json.dumps(value)}"


def _variant(path: str, common: Sequence[str], chosen: Sequence[AxisValue], out: str | None) -> Variant:
    own = [override for choice in chosen for override in choice.overrides]
    name = "_".join(choice.label for choice in chosen)
    if any(override.startswith("train.output=") for override in own):
        raise InputError("train.output: each variant has a folder of its own, named after its settings, in --out.")
    try:
        recipe, notes = read(path, [*common, *own])
    except RecipeError as error:
        places = {choice.where for choice in chosen} - {SOURCE}
        text = str(error)
        for place in places:
            text = text.replace(f"{SOURCE}: ", f"{place}")
        raise RecipeError(text) from None
    output = str(Path(out or recipe.train.output) / name)
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"output": output})})
    settings = dict(override.split("=", 1) for override in own)
    return Variant(name, settings, recipe, tuple(notes))


def _plain(value: str) -> str:
    """A value as a part of a folder's name."""
    return re.sub(r"[^\w.+-]+", "-", value).strip("-.")[-LONGEST:]
