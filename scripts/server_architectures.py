"""Write qlora/exporters/server_architectures.json: which model classes servers list in their sources.

    python scripts/server_architectures.py vllm=FOLDER sglang=FOLDER mlx_lm=FOLDER

FOLDER is the package's folder as installed, or as unpacked from its wheel; nothing of it is imported.
"""

import ast
import json
import re
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

OUTPUT = Path(__file__).parents[1] / "qlora" / "exporters" / "server_architectures.json"
VLLM_TABLES = ("_TEXT_GENERATION_MODELS", "_MULTIMODAL_MODELS", "_TRANSFORMERS_SUPPORTED_MODELS")


def assigned(path: Path) -> Iterator[tuple[str, ast.expr]]:
    """Names and values of a module's assignments."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            yield node.targets[0].id, node.value


def vllm(package: Path) -> tuple[str, list[str]]:
    """Architectures of the registry's tables of generating models."""
    source = "model_executor/models/registry.py"
    tables = [value for name, value in assigned(package / source) if name in VLLM_TABLES]
    names = [key.value for table in tables if isinstance(table, ast.Dict) for key in table.keys if key]  # type: ignore[attr-defined]
    return f"vllm/{source}", names


def sglang(package: Path) -> tuple[str, list[str]]:
    """The classes that the files of srt/models name as their entries."""
    names = []
    for path in sorted((package / "srt" / "models").glob("*.py")):
        entries = [value for name, value in assigned(path) if name == "EntryClass"]
        names += [node.id for entry in entries for node in ast.walk(entry) if isinstance(node, ast.Name)]
    return "sglang/srt/models", names


def mlx_lm(package: Path) -> tuple[str, list[str]]:
    """Model types: the files of models, and other types that they also read."""
    files = [path.stem for path in (package / "models").glob("*.py") if "class ModelArgs" in path.read_text()]
    remapped = next(value for name, value in assigned(package / "utils.py") if name == "MODEL_REMAPPING")
    return "mlx_lm/models", files + [str(key.value) for key in remapped.keys]  # type: ignore[attr-defined]


READERS = {"vllm": ("vLLM", vllm), "sglang": ("SGLang", sglang), "mlx_lm": ("mlx-lm", mlx_lm)}


def version_of(package: Path) -> str:
    """The version in the name of the metadata folder beside a package."""
    names = [path.name for path in package.parent.glob("*.dist-info")]
    match = next(re.match(rf"{package.name}(?:_cpu)?-([\w.]+)\.dist-info", name) for name in sorted(names)
                 if re.match(rf"{package.name}(?:_cpu)?-", name))  # fmt: skip
    assert match is not None
    return match[1]


def main(arguments: list[str]) -> None:
    """Replace the entries of the named servers."""
    content: dict[str, Any] = json.loads(OUTPUT.read_text()) if OUTPUT.exists() else {}
    for argument in arguments:
        key, _, folder = argument.partition("=")
        name, read = READERS[key]
        source, names = read(Path(folder))
        day = datetime.now(UTC).date().isoformat()
        content[name] = {
            "version": version_of(Path(folder)), "read": day, "source": source, "names": sorted(set(names)),
        }  # fmt: skip
    OUTPUT.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
