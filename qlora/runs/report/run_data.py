"""One run as plain data, and readers of its manifest, in which any key may be missing or null."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qlora.runs.report.series import finite


@dataclass(frozen=True)
class RunData:
    """What a page needs of a run; everything but the name may be empty while the run is in progress."""

    name: str
    manifest: Mapping[str, Any] = field(default_factory=dict)  # run.json
    metrics: Sequence[Mapping[str, Any]] = ()  # the lines of metrics.jsonl
    recipe_text: str = ""
    samples: Sequence[Mapping[str, str]] = ()  # prompt, reference, before, after
    benchmarks: Mapping[str, Any] = field(default_factory=dict)  # task of lm-evaluation-harness -> metrics, rows


def section(manifest: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """The mapping at the path `keys`; an empty one if there is none."""
    value = value_at(manifest, *keys)
    return value if isinstance(value, Mapping) else {}


def number(manifest: Mapping[str, Any], *keys: str) -> float | None:
    """The finite number at the path `keys`, or None."""
    value = value_at(manifest, *keys)
    return value if finite(value) else None


def string(manifest: Mapping[str, Any], *keys: str) -> str:
    """The text or number at the path `keys` as text; empty if there is none."""
    value = value_at(manifest, *keys)
    return str(value) if isinstance(value, str | int | float) else ""


def value_at(manifest: Any, *keys: str) -> Any:
    """The value at the path `keys`, or None."""
    for key in keys:
        manifest = manifest.get(key) if isinstance(manifest, Mapping) else None
    return manifest
