"""Where the base model's files are: a local folder, or a hub repository brought to one.  Door: huggingface_hub."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from qlora.errors import BaseModelError

WANTED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt"]
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class ModelFolder:
    """A base model on disk: what the user called it, where it is, and the commit it was taken from (None if local)."""

    name: str
    path: Path
    revision: str | None


def find(name: str, revision: str | None = None) -> ModelFolder:
    """The folder of a base model, downloaded first when `name` is a hub repository; nothing is fetched if it is cached.

    BaseModelError if the folder does not hold a model in safetensors, or the repository can't be had.
    """
    path = Path(name).expanduser()
    if path.exists() or _looks_local(name):
        return ModelFolder(name, _checked(path), None)
    path = _download(name, revision)
    return ModelFolder(name, _checked(path), path.name)


def find_here(name: str, revision: str | None = None) -> ModelFolder | None:
    """`find` for a base that is on this machine already; None, and nothing is fetched, if it is not."""
    path = Path(name).expanduser()
    if not path.exists() and not _looks_local(name):
        try:
            path = Path(snapshot_download(name, revision=revision, allow_patterns=WANTED, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError):
            return None
    try:
        return ModelFolder(name, _checked(path), revision)
    except BaseModelError:
        return None


def find_config(name: str, revision: str | None = None) -> Path:
    """The config.json of a model, which is all that planning needs: in a folder, the file itself, or from the hub."""
    path = Path(name).expanduser()
    if path.is_file() or (path / "config.json").is_file():
        return path if path.is_file() else path / "config.json"
    if path.exists() or _looks_local(name):
        raise BaseModelError(f"model: {path} has no config.json, so it is not a model folder.")
    return _download(name, revision, ["config.json"]) / "config.json"


def find_tokenizer(name: str, revision: str | None = None) -> Path:
    """The folder of a model's tokenizer, for what needs no weight: of the hub only these few files are fetched."""
    path = Path(name).expanduser()
    if path.exists() or _looks_local(name):
        return _checked(path)
    return _download(name, revision, [*TOKENIZER_FILES, "config.json"])


def _looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") != 1


def _download(name: str, revision: str | None, wanted: list[str] = WANTED) -> Path:
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        pass
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise BaseModelError(
            f"model: {name!r} is no folder here, and the hub did not give it ({type(error).__name__}). "
            "Check the name, the network, and HF_TOKEN if the repository is gated; a local folder works too."
        ) from error


def _checked(path: Path) -> Path:
    if not path.is_dir():
        found = "a file" if path.exists() else "nothing"
        raise BaseModelError(f"model: {path} is {found}; a folder with config.json and *.safetensors is needed.")
    if not (path / "config.json").is_file():
        raise BaseModelError(f"model: {path} has no config.json, so it is not a model folder.")
    if not any(path.glob("*.safetensors")):
        pickled = sorted(file.name for file in path.iterdir() if file.suffix in PICKLED)
        advice = (
            f" It has {pickled[0]}, which is pickle and could run code: convert it with transformers in a sandbox."
            if pickled
            else ""
        )
        raise BaseModelError(f"model: {path} has no *.safetensors file.{advice}")
    return path


TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "added_tokens.json",
    "chat_template.jinja", "vocab.json", "merges.txt", "vocab.txt",
)  # fmt: skip


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer's files that are there: copied byte for byte, servers read rewritten ones differently."""
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
