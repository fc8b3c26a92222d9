"""The chat template of a run: recorded with it, and used again where the base's own has changed since."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora.data.conversations.encoder import Encoder
from qlora.model.download import TEMPLATE_FILE
from qlora.model.load_base import Base
from qlora.recipe.dataset_profile import build_encoder
from qlora.recipe.recipe import Recipe
from qlora.runs.artifacts import read_manifest
from qlora.utils.atomic_files import write_text

Log = Callable[[str], None]
SECTION = "chat_template"  # of the manifest


@dataclass(frozen=True)
class TrainedEncoder:
    """What decides the tokens of a record: a digest of all of it, and the chat template."""

    sha256: str = ""  # of tokenizer, templates and settings
    name: str = ""  # where the template is from
    text: str = ""
    args: Mapping[str, Any] = field(default_factory=dict)  # data.template_args
    is_file: bool = False  # one template, which a file can hold

    @classmethod
    def of(cls, encoder: Encoder) -> "TrainedEncoder":
        """The record of an encoder."""
        is_file = len(encoder.named_templates) == 1
        return cls(encoder.sha256, encoder.template.name, encoder.template.text, encoder.template_args, is_file)

    def as_json(self) -> dict[str, Any]:
        """The section of the manifest."""
        return {"name": self.name, "sha256": _sha256(self.text), "args": dict(self.args)}

    def write(self, folder: Path) -> list[str]:
        """Write the template; returns the names of the files."""
        if not self.is_file:
            return []
        write_text(folder / TEMPLATE_FILE, self.text)
        return [TEMPLATE_FILE]


def with_trained_template(recipe: Recipe, base: Base, run: Path | None, log: Log) -> Recipe:
    """The recipe, which names the run's own template if the base's differs from it; a line is logged then.

    run: the folder of a run, or of an adapter or a model without a manifest, which has no record.
    """
    recorded = _recorded(run)
    if run is None or recorded is None:
        return recipe
    current = build_encoder(recipe, base.tokenizer).template
    if _sha256(current.text) == recorded:
        return recipe
    path = run / TEMPLATE_FILE
    if path.is_file() and _sha256(path.read_text(encoding="utf-8", errors="replace")) == recorded:
        log(f"{current.name} has changed since training: {path}, which the run was trained with, is used")
        return recipe.model_copy(update={"model": recipe.model.model_copy(update={"chat_template": str(path)})})
    log(f"careful: {current.name} has changed since training, and {run} has no copy of the old one: answers may differ")
    return recipe


def _recorded(run: Path | None) -> str | None:
    """The sha256 of the template in a run's manifest; None without one."""
    manifest = read_manifest(run) if run else None
    section = (manifest or {}).get(SECTION)
    return str(section["sha256"]) if isinstance(section, Mapping) and "sha256" in section else None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
