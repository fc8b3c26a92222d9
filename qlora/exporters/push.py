"""`qlora push`: which files of a folder are uploaded to the hub, and what is checked before.

The cheap checks come first; torch and the hub's client are imported after them.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora._version import __version__
from qlora.adapters import adapter_folder
from qlora.errors import InputError
from qlora.model import model_folder
from qlora.runs.artifacts import MANIFEST, MODEL_CARD
from qlora.runs.relative_paths import folder_of
from qlora.runs.report.model_card import is_hub_name
from qlora.utils.atomic_files import read_json
from qlora.utils.paths import similar_path


def push(source: str, repository: str, public: bool, base: str | None, log: Callable[[str], None]) -> dict[str, Any]:
    """Upload an adapter or a model in one commit; returns the answer of `qlora push`.

    InputError if the folder is neither, is damaged, or names a base that only exists on this machine.
    """
    folder = Path(source)
    weights = _weight_files(folder, base)
    from qlora.exporters.ollama import MODELFILE
    from qlora.model.download import TOKENIZER_FILES
    from qlora.runs.load_run import refuse_damaged

    refuse_damaged(folder, log)
    # Recipe, manifest and report may contain local paths, so they are not uploaded.
    names = (*TOKENIZER_FILES, "generation_config.json", "certificate.json", MODELFILE, MODEL_CARD)
    files = {**weights, **{name: folder / name for name in names if (folder / name).is_file()}}
    sizes = {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in files.items()}
    for name, size in sizes.items():
        log(f"  {size:>15,}  {name}")
    visibility = "public" if public else "private"
    log(f"uploading {len(files)} files, {sum(sizes.values()) / 2**20:,.1f} MiB, to {repository} ({visibility})")
    from qlora.exporters.hub import commit

    url = commit(repository, files, public, f"Push with qlora {__version__}")
    return {"url": url, "repository": repository, "private": not public, "files": sizes}


def _weight_files(folder: Path, base: str | None) -> dict[str, Path | bytes]:
    """The files of the adapter, or of the model."""
    weights, config = folder / adapter_folder.WEIGHTS, folder / adapter_folder.CONFIG
    if weights.is_file() and config.is_file():
        return {weights.name: weights, config.name: _config_for_hub(config, base)}
    model, config = model_folder.model_files(folder), folder / model_folder.CONFIG
    if model and config.is_file():
        return {file.name: file for file in (*model, config)}
    allowed = "Name a finished run, or the folder of an export."
    if not folder.is_dir():
        raise InputError(f"push: {folder} is no folder. {allowed}{similar_path(folder)}")
    hint = f"Its {MANIFEST} is there, the weights are not. " if (folder / MANIFEST).is_file() else ""
    raise InputError(f"push: {folder} holds no adapter and no model. {hint}{allowed}")


def _config_for_hub(path: Path, base: str | None) -> bytes:
    """adapter_config.json with a base that is on the hub."""
    try:
        config = read_json(path)
    except ValueError as error:
        raise InputError(f"push: {path} is not a JSON object: {error}.") from error
    name = base or str(config.get("base_model_name_or_path") or "")
    if not is_hub_name(name) or (base is None and folder_of(name, path.parent)):
        raise InputError(
            f"push: {path.name} names the base {name!r}, a path on this machine. Give its name on the hub: "
            "--base OWNER/NAME."
        )
    return (json.dumps(config | {"base_model_name_or_path": name}, indent=2, ensure_ascii=False) + "\n").encode()
