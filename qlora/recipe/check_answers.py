"""What an objective that compares answers needs of a recipe's files, checked before any weight is loaded."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from qlora.adapters.adapter_folder import require_adapter_folder
from qlora.data import FORMATS, SIDED_FORMATS
from qlora.data.conversations.encode_records import detect_format
from qlora.data.reading import source
from qlora.data.reading.resolve_paths import resolve_source
from qlora.data.types import Record
from qlora.errors import AdapterError, DataError
from qlora.training.objectives import READ_BY

if TYPE_CHECKING:
    from qlora.data import Source
    from qlora.recipe.recipe import Recipe

LOOKED_AT = 16  # records of a data set: one of them has the columns
Problem = tuple[str, str]


def answer_problems(recipe: "Recipe") -> Iterator[Problem]:
    """Data of another kind than the objective compares, labels that are all alike, a reference that is no adapter."""
    data = recipe.data
    for key, sources in (("data.train", data.train), ("data.eval", data.eval or ())):
        for item in sources:
            try:
                yield from ((key, problem) for problem in _columns(recipe, item))
            except DataError:  # of its path, which the check of `data` reports
                continue
    if recipe.objective.sided_format == "feedback":
        yield from _labels(recipe)
    if recipe.objective.kind in READ_BY["reference"] and recipe.objective.reference != "base":
        try:
            require_adapter_folder(Path(recipe.objective.reference).expanduser())
        except AdapterError as error:
            yield "objective.reference", f"{error} Or base: the adapter switched off."


def _columns(recipe: "Recipe", item: "Source") -> Iterator[str]:
    """Why none of the first records of a local data set can be read as what the objective compares, or the reverse."""
    resolved = resolve_source(item)
    if resolved.hub:
        return
    records = source.read_records(item, resolved, (0, 0))
    first = [record for record in islice(records, LOOKED_AT) if isinstance(record, Record)]
    needed, kind = recipe.objective.sided_format, recipe.objective.kind
    if not first:
        return
    columns = ", ".join(map(str, first[0].fields))
    if needed is None:
        detected = {detect_format(record) for record in first}
        if (item.format or recipe.data.format) == "auto" and detected <= {*SIDED_FORMATS}:
            yield f"{item.path}: preference pairs ({columns}), and objective.kind is sft. Use dpo, ipo, orpo or simpo."
    elif not any(_has_columns(needed, record) for record in first):
        expected = "prompt, chosen and rejected" if needed == "preference" else "prompt, completion and label"
        yield f"{item.path}: has the columns {columns}; objective.kind {kind} needs {expected}. Rename with `columns`."


def _has_columns(needed: str, record: Record) -> bool:
    labeled = "label" in record.fields if needed == "feedback" else False
    return labeled or bool(FORMATS[needed]().matches(record.fields))


def _labels(recipe: "Recipe") -> Iterator[Problem]:
    """Labels that are all true, or all false, teach nothing about the difference. Ends at the first two that differ."""
    seen = set[object]()
    try:
        for item in recipe.data.train:
            resolved = resolve_source(item)
            if resolved.hub:
                return
            for record in source.read_records(item, resolved, (0, 0)):
                label = record.fields.get("label") if isinstance(record, Record) else None
                seen |= {label} if isinstance(label, bool) else set()
                if len(seen) > 1:
                    return
    except DataError:
        return
    if seen:
        only = str(*seen).lower()
        yield (
            "data.train",
            f"every label is {only}: kto needs both. To learn answers as they are, use objective.kind: sft.",
        )
