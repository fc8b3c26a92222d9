"""An adapter folder in PEFT's file format: its file names, its base's name, what to do if a file is missing.

Imports no torch, so that a wrong path is reported before anything heavy is loaded.
"""

from pathlib import Path

from qlora.errors import AdapterError
from qlora.utils.atomic_files import read_json
from qlora.utils.paths import similar_path

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PICKLE = "adapter_model.bin"  # what old versions of PEFT wrote
MLX = "adapters.safetensors"
MAX_LISTED = 3  # subfolders in a message


def require_adapter_folder(folder: Path) -> Path:
    """`folder`. AdapterError, with what to do, unless it has the two files of an adapter."""
    refuse_file(folder)
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise AdapterError(f"{folder} {problem}. Allowed: a folder with {CONFIG} and {WEIGHTS}.{similar_path(folder)}")
    if not (folder / WEIGHTS).is_file() and (folder / PICKLE).is_file():
        raise AdapterError(
            f"{folder}: found {PICKLE}, which is pickle and could run code when it is read; allowed: {WEIGHTS}. "
            'Convert it in that folder, which runs no code of the file: python -c "import torch, safetensors.torch; '
            f"t = torch.load('{PICKLE}', weights_only=True); "
            f"safetensors.torch.save_file({{k: v.clone() for k, v in t.items()}}, '{WEIGHTS}', {{'format': 'pt'}})\""
        )
    if not (folder / WEIGHTS).is_file() and (folder / MLX).is_file():
        raise AdapterError(
            f"{folder}: found {MLX}, an adapter of MLX, which names and transposes its matrices in ways of its own; "
            f"allowed: {WEIGHTS} of PEFT. Fuse it there (mlx_lm.fuse) and use the fused model."
        )
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            needed = f"an adapter folder has {CONFIG} and {WEIGHTS}."
            raise AdapterError(f"{folder / name} does not exist: {needed}{name_nested_adapters(folder)}")
    return folder


def refuse_file(path: Path) -> None:
    """AdapterError for a file of an adapter in place of its folder."""
    if path.name in (WEIGHTS, CONFIG, PICKLE) and path.is_file():
        raise AdapterError(f"{path} is a file of an adapter. Name its folder: {path.parent}")


def name_nested_adapters(folder: Path) -> str:
    """End of a message: the subfolders that are adapters, as trainers and PEFT write them; empty without any."""
    nested = sorted((path.parent for path in folder.glob(f"*/{CONFIG}")), key=_number_at_end)
    if not nested:
        return ""
    others = f" and {len(nested) - MAX_LISTED} more" if len(nested) > MAX_LISTED else ""
    return f" Found adapters below it: {', '.join(map(str, nested[-MAX_LISTED:]))}{others}. Name one of them."


def _number_at_end(path: Path) -> tuple[int, str]:
    """A sort key: checkpoint-4 before checkpoint-12."""
    number = path.name.rpartition("-")[2]
    return (int(number) if number.isdecimal() else 0, path.name)


def read_base_name(folder: Path) -> str:
    """The base model that the adapter_config.json of a folder names. AdapterError if it names none."""
    path = folder / CONFIG
    try:
        name = read_json(path).get("base_model_name_or_path")
    except ValueError as error:
        raise AdapterError(f"{path} is not a JSON object: {error}") from error
    if not isinstance(name, str) or not name:
        raise AdapterError(f"{path}: base_model_name_or_path names no base model. {name_the_base(folder)}")
    return name


def name_the_base(folder: Path) -> str:
    """How to load an adapter whose base model can't be found."""
    return f"Correct it, or name the base model yourself, as in `qlora eval MODEL --adapter {folder} --data FILE`."
