"""The base model's folder: a local one, or a Hub repository downloaded to the cache of huggingface_hub."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from qlora.errors import BaseModelError

MODEL_PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt"]
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class ModelFolder:
    """A base model on disk: the name in the recipe, its folder, and the commit of the Hub (None if local)."""

    name: str
    path: Path
    revision: str | None


def find_model(name: str, revision: str | None = None) -> ModelFolder:
    """The folder of a base model; a Hub repository is downloaded unless it is cached.

    BaseModelError if the folder holds no model in safetensors, or the repository can't be downloaded.
    """
    path = Path(name).expanduser()
    if path.exists() or _looks_local(name):
        return ModelFolder(name, _checked(path), None)
    path = _download(name, revision)
    return ModelFolder(name, _checked(path), path.name)


def find_local(name: str, revision: str | None = None) -> ModelFolder | None:
    """`find_model` without a download: None if the base is not on this machine."""
    path = Path(name).expanduser()
    if not path.exists() and not _looks_local(name):
        try:
            path = Path(
                snapshot_download(name, revision=revision, allow_patterns=MODEL_PATTERNS, local_files_only=True)
            )
        except (LocalEntryNotFoundError, HFValidationError):
            return None
    try:
        return ModelFolder(name, _checked(path), revision)
    except BaseModelError:
        return None


def find_config(name: str, revision: str | None = None) -> Path:
    """The config.json of a model, which is all that planning needs: a local file, or downloaded alone."""
    path = Path(name).expanduser()
    if path.is_file() or (path / "config.json").is_file():
        return path if path.is_file() else path / "config.json"
    if path.exists() or _looks_local(name):
        raise BaseModelError(f"model: {path} has no config.json, so it is not a model folder.")
    return _download(name, revision, ["config.json"]) / "config.json"


def find_tokenizer(name: str, revision: str | None = None) -> Path:
    """The folder of a model's tokenizer; from the Hub only its files and config.json are downloaded."""
    path = Path(name).expanduser()
    if path.exists() or _looks_local(name):
        return _checked(path)
    return _download(name, revision, [*TOKENIZER_FILES, "config.json"])


def _looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") != 1


def _download(name: str, revision: str | None, patterns: list[str] = MODEL_PATTERNS) -> Path:
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        pass
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise BaseModelError(
            f"model: {name!r} is not a local folder, and the download from the hub failed ({type(error).__name__}). "
            "Check the name, the network, and HF_TOKEN if the repository is gated; a local folder works too."
        ) from error


def _checked(path: Path) -> Path:
    if not path.is_dir():
        kind = "a file" if path.exists() else "missing"
        raise BaseModelError(f"model: {path} is {kind}; allowed: a folder with config.json and *.safetensors.")
    if not (path / "config.json").is_file():
        raise BaseModelError(f"model: {path} has no config.json, so it is not a model folder.")
    if not any(path.glob("*.safetensors")):
        pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLE_SUFFIXES)
        advice = (
            f" It has {pickles[0]}, which is pickle and could run code: convert it with transformers in a sandbox."
            if pickles
            else ""
        )
        raise BaseModelError(f"model: {path} has no *.safetensors file.{advice}")
    return path


TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "added_tokens.json",
    "chat_template.jinja", "vocab.json", "merges.txt", "vocab.txt",
)  # fmt: skip


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer's files in `folder`; copied byte for byte, since servers read rewritten ones differently."""
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
