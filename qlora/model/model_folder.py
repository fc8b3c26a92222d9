"""The folder of a base model: whether a name is a path, and whether the folder holds a model. Imports no library."""

import json
from dataclasses import dataclass
from pathlib import Path

from qlora.errors import BaseModelError
from qlora.utils.atomic_files import read_json
from qlora.utils.paths import similar_path

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TEXT_FILES = ("*.json", "*.jinja", "*.model")
POINTER = b"version https://git-lfs"  # start of a file that git could not fetch
MAX_HEADER_BYTES = 100_000_000  # of safetensors itself
FETCH = "Fetch the folder again."
EXPORT_MARK = "qlora_export"  # key in a safetensors header
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
ALLOWED = f"a folder with {CONFIG} and *.safetensors, or a hub name such as Qwen/Qwen3-0.6B"


@dataclass(frozen=True)
class ModelFolder:
    """A base model on disk: the name in the recipe, its folder, and the commit of the Hub (None if local)."""

    name: str
    path: Path
    revision: str | None


def is_local(name: str) -> bool:
    """Whether a model's name is a path: it exists, or it can't be a name on the hub."""
    return Path(name).expanduser().exists() or name.startswith((".", "/", "~")) or name.rstrip("/").count("/") != 1


def model_files(folder: Path) -> list[Path]:
    """The safetensors files of a model that this program has written, and their index."""
    files = (*folder.glob("model*.safetensors"), folder / INDEX)
    return [file for file in files if file.is_file()]


def is_export(folder: Path) -> bool:
    """Whether a folder is a model that `qlora export` wrote: the headers of its files say so, whatever it is called."""
    file = next((file for file in model_files(folder) if file.suffix == ".safetensors"), None)
    if file is None:
        return False
    try:
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size)) if size <= MAX_HEADER_BYTES else {}
        return EXPORT_MARK in header.get("__metadata__", {})
    except (OSError, ValueError, AttributeError, TypeError):  # loading the model reports what is wrong with it
        return False


def require_model_folder(path: Path) -> Path:
    """`path`. BaseModelError unless it is a folder that holds a model in safetensors."""
    require_config(path)
    if not any(path.glob("*.safetensors")):
        pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLE_SUFFIXES)
        advice = (
            f" It has {pickles[0]}, which is pickle and could run code: convert it with transformers in a sandbox."
            if pickles
            else f" Allowed: {ALLOWED}."
        )
        raise BaseModelError(f"model: {path} has no *.safetensors file.{advice}")
    _require_downloaded(path)
    return path


def _require_downloaded(path: Path) -> None:
    """BaseModelError if a file of the model is missing, cut off, or the pointer that git leaves without git-lfs."""
    for file in sorted(file for pattern in TEXT_FILES for file in path.glob(pattern)):
        _refuse_pointer(file)
    if (path / INDEX).is_file():
        try:
            names = {str(name) for name in read_json(path / INDEX)["weight_map"].values()}
        except (ValueError, KeyError, AttributeError):
            return  # the reader of the weights says what is wrong
    else:
        names = {SINGLE} if (path / SINGLE).is_file() else {file.name for file in path.glob("*.safetensors")}
    for name in sorted(names):
        if Path(name).name != name:
            return  # as above
        if not (path / name).is_file():
            raise BaseModelError(f"model: {path / INDEX} names {name}, which is missing. {FETCH}")
        _refuse_pointer(path / name)
        _refuse_incomplete(path / name)


def _refuse_pointer(file: Path) -> None:
    with file.open("rb") as stream:
        if stream.read(len(POINTER)) == POINTER:
            raise BaseModelError(f"model: {file} is a pointer of git-lfs, not the file. Run `git lfs pull` there.")


def _refuse_incomplete(file: Path) -> None:
    """BaseModelError for a safetensors file that is shorter than its header says: 8 bytes of length, JSON, tensors."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > MAX_HEADER_BYTES:
            return  # as above
        if 8 + length > size:
            raise BaseModelError(f"model: {file} is cut off: {size:,} bytes are less than its header. {FETCH}")
        try:
            header = json.loads(stream.read(length))
            end = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            return  # the reader of the weights says what is wrong
    if isinstance(end, int) and 8 + length + end > size:
        missing = 8 + length + end - size
        raise BaseModelError(
            f"model: {file} is cut off: {missing:,} of {8 + length + end:,} bytes are missing. {FETCH}"
        )


def require_config(path: Path) -> Path:
    """The config.json in a model folder. BaseModelError if there is none."""
    if not path.is_dir():
        problem = "is a file" if path.exists() else "does not exist"
        raise BaseModelError(f"model: {path} {problem}. Allowed: {ALLOWED}.{similar_path(path)}")
    if not (path / CONFIG).is_file():
        raise BaseModelError(f"model: {path} has no {CONFIG}, so it is not a model folder. Allowed: {ALLOWED}.")
    return path / CONFIG
