"""A checkpoint's folder: its file names, and what is wrong with one that can't be used. Imports no torch."""

import re
from pathlib import Path
from typing import Any

from qlora.adapters import adapter_folder
from qlora.utils.atomic_files import is_bare_name, read_json, sha256_of

NAME = re.compile(r"checkpoint-(\d{6,})")
MANIFEST, POSITION, OPTIMIZER = "manifest.json", "position.json", "optimizer.safetensors"
FORMAT = 1  # of the folder; folders of another format are refused
REQUIRED_FILES = {POSITION, OPTIMIZER}
WEIGHT_FILES = ({adapter_folder.WEIGHTS, adapter_folder.CONFIG}, {"config.json"})  # of an adapter, or of a full model


def checkpoints_in(output: Path) -> list[Path]:
    """The folders of checkpoints in a run folder, oldest first."""
    paths = output.iterdir() if output.is_dir() else ()
    folders = [path for path in paths if NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()]
    return sorted(folders, key=step_of)


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint's folder; -1 for another name."""
    match = NAME.fullmatch(folder.name)
    return int(match.group(1)) if match else -1


def find_damage(folder: Path, hashes: bool = True) -> str | None:
    """Why a checkpoint can't be used, or None if every file matches the manifest; without `hashes`, if all exist."""
    try:
        is_complete = (folder / MANIFEST).read_bytes()[-2:] == b"}\n"
        manifest = read_json(folder / MANIFEST)
    except (OSError, ValueError):
        is_complete, manifest = False, {}
    files, version = manifest.get("files"), manifest.get("format")
    if not is_complete or not isinstance(files, dict):
        return f"{MANIFEST} is missing or damaged, so the checkpoint is incomplete"
    if version != FORMAT or type(version) is not int:
        return f"{MANIFEST} has format {str(version)[:20]!r}; this version of qlora reads format {FORMAT}"
    if not files.keys() >= REQUIRED_FILES or not any(files.keys() >= weights for weights in WEIGHT_FILES):
        return f"{MANIFEST} does not list all files of a checkpoint"
    if manifest.get("step") != step_of(folder) and NAME.fullmatch(folder.name):
        return f"{MANIFEST} belongs to another step"
    reasons = (_find_file_damage(folder, name, sha256, hashes) for name, sha256 in files.items())
    return next((reason for reason in reasons if reason), None)


def _find_file_damage(folder: Path, name: str, sha256: Any, hashes: bool) -> str | None:
    """What is wrong with a file that the manifest lists; a name that points outside the folder is never opened."""
    path = folder / name if is_bare_name(name) else folder
    if path == folder or not path.is_file():
        problem = "is not a plain file name" if path == folder else "is missing"
        return f"{name[:80]!r}, which {MANIFEST} lists, {problem}"
    if hashes and sha256_of(path) != sha256:
        return f"{name} is damaged (its sha256 is not the one in {MANIFEST})"
    return None
