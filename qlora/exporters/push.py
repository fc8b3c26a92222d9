"""`qlora push`: which files of a folder are uploaded to the hub, and what is checked before."""

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
from qlora.runs.artifacts import MANIFEST, MODEL_CARD
from qlora.runs.load_run import refuse_damaged
from qlora.runs.report.model_card import is_hub_name
from qlora.utils.atomic_files import read_json

# Recipe, manifest and report may contain local paths, so they are not uploaded.
OTHER_FILES = (*TOKENIZER_FILES, "generation_config.json", "certificate.json", MODELFILE, MODEL_CARD)


def push(source: str, repository: str, public: bool, base: str | None, log: Callable[[str], None]) -> dict[str, Any]:
    """Upload an adapter or a model in one commit; returns the answer of `qlora push`.

    InputError if the folder is neither, is damaged, or names a base that only exists on this machine.
    """
    folder = Path(source)
    refuse_damaged(folder, log)
    others = {name: folder / name for name in OTHER_FILES if (folder / name).is_file()}
    files = {**_weight_files(folder, base), **others}
    sizes = {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in files.items()}
    for name, size in sizes.items():
        log(f"  {size:>15,}  {name}")
    visibility = "public" if public else "private"
    log(f"uploading {len(files)} files, {sum(sizes.values()) / 2**20:,.1f} MiB, to {repository} ({visibility})")
    from qlora.exporters.hub import commit  # takes a second to import

    url = commit(repository, files, public, f"Push with qlora {__version__}")
    return {"url": url, "repository": repository, "private": not public, "files": sizes}


def _weight_files(folder: Path, base: str | None) -> dict[str, Path | bytes]:
    """The files of the adapter, or of the model."""
    if (folder / peft_files.CONFIG).is_file() and (folder / peft_files.WEIGHTS).is_file():
        return {
            peft_files.WEIGHTS: folder / peft_files.WEIGHTS,
            peft_files.CONFIG: _config_for_hub(folder / peft_files.CONFIG, base),
        }
    if full_model.has_full_model(folder):
        return {file.name: file for file in (*full_model.model_files(folder), folder / full_model.CONFIG)}
    hint = "Name a finished run, or the folder of an export."
    if (folder / MANIFEST).is_file() or not folder.is_dir():
        hint = "Is the name right? " + hint
    raise InputError(f"push: {folder} holds no adapter and no model. {hint}")


def _config_for_hub(path: Path, base: str | None) -> bytes:
    """adapter_config.json with a base that is on the hub."""
    try:
        config = read_json(path)
    except ValueError as error:
        raise InputError(f"push: {path} is not a JSON object: {error}.") from error
    name = base or str(config.get("base_model_name_or_path") or "")
    if not is_hub_name(name):
        raise InputError(
            f"push: {path.name} names the base {name!r}, a path on this machine. Give its name on the hub: "
            "--base OWNER/NAME."
        )
    return (json.dumps(config | {"base_model_name_or_path": name}, indent=2, ensure_ascii=False) + "\n").encode()
