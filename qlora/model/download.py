"""The base model's folder: a local one, or a Hub repository downloaded to the cache of huggingface_hub."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from qlora.errors import BaseModelError
from qlora.model.model_folder import ModelFolder, is_local, require_config, require_model_folder
from qlora.utils.paths import similar_path

MODEL_PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt"]


def find_model(name: str, revision: str | None = None) -> ModelFolder:
    """The folder of a base model; a Hub repository is downloaded unless it is cached.

    BaseModelError if the folder holds no model in safetensors, or the repository can't be downloaded.
    """
    if is_local(name):
        return ModelFolder(name, require_model_folder(Path(name).expanduser()), None)
    path = _download(name, revision)
    return ModelFolder(name, require_model_folder(path), path.name)


def find_local(name: str, revision: str | None = None) -> ModelFolder | None:
    """`find_model` without a download: None if the base is not on this machine."""
    path = Path(name).expanduser()
    if not is_local(name):
        try:
            path = Path(
                snapshot_download(name, revision=revision, allow_patterns=MODEL_PATTERNS, local_files_only=True)
            )
        except (LocalEntryNotFoundError, HFValidationError):
            return None
    try:
        return ModelFolder(name, require_model_folder(path), revision)
    except BaseModelError:
        return None


def find_config(name: str, revision: str | None = None) -> Path:
    """The config.json of a model, which is all that planning needs: a local file, or downloaded alone."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if is_local(name):
        return require_config(path)
    return _download(name, revision, ["config.json"]) / "config.json"


def find_tokenizer(name: str, revision: str | None = None) -> Path:
    """The folder of a model's tokenizer; from the Hub only its files and config.json are downloaded."""
    if is_local(name):
        return require_model_folder(Path(name).expanduser())
    return _download(name, revision, [*TOKENIZER_FILES, NAMED_TEMPLATES, "config.json"])


def _download(name: str, revision: str | None, patterns: list[str] = MODEL_PATTERNS) -> Path:
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        pass
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = _reason(error, name, revision)
        raise BaseModelError(
            f"model: {name!r} is no folder here, and can't be had from the hub: {reason}.{similar_path(Path(name))}"
        ) from error


def _reason(error: Exception, name: str, revision: str | None) -> str:
    """Why a repository can't be downloaded, and what to do."""
    if isinstance(error, GatedRepoError):  # before its base class
        return f"it is gated. Accept its terms at https://huggingface.co/{name}, and set HF_TOKEN"
    if isinstance(error, RevisionNotFoundError):
        return f"it has no revision {revision!r}. Correct model.revision"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or it is private. Check the name, and HF_TOKEN for a private one"
    if isinstance(error, HFValidationError):
        return "this is no hub name. A hub name is OWNER/NAME of letters, digits, and . _ -"
    if isinstance(error, LocalEntryNotFoundError):
        return "it is not in the cache, and the hub can't be reached. Check the name and the network"
    return f"the download failed ({type(error).__name__}). Check the network, and run the command again"


TEMPLATE_FILE = "chat_template.jinja"  # transformers reads it in place of the template in tokenizer_config.json
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "added_tokens.json",
    TEMPLATE_FILE, "vocab.json", "merges.txt", "vocab.txt",
)  # fmt: skip
NAMED_TEMPLATES = "additional_chat_templates/*.jinja"  # of tokenizers with more than one


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer's files in `folder`; copied byte for byte, since servers read rewritten ones differently."""
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
