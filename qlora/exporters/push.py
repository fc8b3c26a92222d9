"""`qlora push`: which files of a folder go to the hub, and what is checked first. Nothing is ever sent by itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora._version import __version__
from qlora.adapters import peft_files
from qlora.errors import InputError
from qlora.exporters.ollama import MODELFILE
from qlora.model.download import TOKENIZER_FILES
from qlora.runs import full_model
from qlora.runs.artifacts import CARD, MANIFEST
from qlora.runs.load_run import refuse_damaged
from qlora.runs.report.model_card import is_hub
from qlora.utils.atomic_files import read_json

# What is in a recipe, a manifest or a report may name places of this machine: these stay at home.
BESIDE = (*TOKENIZER_FILES, "generation_config.json", "certificate.json", MODELFILE, CARD)


def push(folder: str, repository: str, public: bool, base: str | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Send an adapter or a model to the hub in one commit; returns what `qlora push` answers.

    InputError if the folder is neither, is not full_model, or names a base that nobody else has.
    """
    place = Path(folder)
    refuse_damaged(place, say)
    files = {**_trained(place, base), **{name: place / name for name in BESIDE if (place / name).is_file()}}
    sizes = {name: len(each) if isinstance(each, bytes) else each.stat().st_size for name, each in files.items()}
    for name, size in sizes.items():
        say(f"  {size:>15,}  {name}")
    seen = "everybody can read it" if public else "private"
    say(f"sending {len(files)} files, {sum(sizes.values()) / 2**20:,.1f} MiB, to {repository} ({seen})")
    from qlora.exporters.hub import commit  # takes a second to import, and talks to the network

    url = commit(repository, files, public, f"Push with qlora {__version__}")
    return {"url": url, "repository": repository, "private": not public, "files": sizes}


def _trained(place: Path, base: str | None) -> dict[str, Path | bytes]:
    """The files that hold what was trained."""
    if (place / peft_files.CONFIG).is_file() and (place / peft_files.WEIGHTS).is_file():
        return {
            peft_files.WEIGHTS: place / peft_files.WEIGHTS,
            peft_files.CONFIG: _config(place / peft_files.CONFIG, base),
        }
    if full_model.is_whole(place):
        return {file.name: file for file in (*full_model.model_files(place), place / full_model.CONFIG)}
    hint = "Name a finished run, or the folder of an export."
    if (place / MANIFEST).is_file() or not place.is_dir():
        hint = "Is the name right? " + hint
    raise InputError(f"push: {place} holds no adapter and no model. {hint}")


def _config(path: Path, base: str | None) -> bytes:
    """adapter_config.json with a base that others have."""
    try:
        config = read_json(path)
    except ValueError as error:
        raise InputError(f"push: {path} is no JSON object: {error}.") from error
    named = base or str(config.get("base_model_name_or_path") or "")
    if not is_hub(named):
        raise InputError(
            f"push: {path.name} names the base {named!r}, a place on this machine. Say what the hub calls it: "
            "--base OWNER/NAME."
        )
    return (json.dumps(config | {"base_model_name_or_path": named}, indent=2, ensure_ascii=False) + "\n").encode()
