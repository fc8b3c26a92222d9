"""One run as plain data, and how its manifest is read: any key may be missing or null."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qlora.runs.report.series import finite


@dataclass(frozen=True)
class RunData:
    """What a page needs of a run; everything but the name may be empty, as it is while the run goes on."""

    name: str
    manifest: Mapping[str, Any] = field(default_factory=dict)  # run.json
    metrics: Sequence[Mapping[str, Any]] = ()  # the lines of metrics.jsonl
    recipe_text: str = ""
    samples: Sequence[Mapping[str, str]] = ()  # prompt, reference, before, after


def section(manifest: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """The mapping found under `keys`, one within the other; an empty one if there is none."""
    found = dig(manifest, *keys)
    return found if isinstance(found, Mapping) else {}


def number(manifest: Mapping[str, Any], *keys: str) -> float | None:
    """The finite number under `keys`, or None."""
    found = dig(manifest, *keys)
    return found if finite(found) else None


def word(manifest: Mapping[str, Any], *keys: str) -> str:
    """The text or number under `keys` as text; empty if there is none."""
    found = dig(manifest, *keys)
    return str(found) if isinstance(found, str | int | float) else ""


def dig(manifest: Any, *keys: str) -> Any:
    """What lies under `keys`, one within the other, or None."""
    for key in keys:
        manifest = manifest.get(key) if isinstance(manifest, Mapping) else None
    return manifest
