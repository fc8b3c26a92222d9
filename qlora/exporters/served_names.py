"""Names of an adapter in the class that reads it: servers build the one that the checkpoint's `architectures` names.

A wrapper checkpoint such as Qwen3.5's has two classes. Its text class, which trains, calls a layer `model.layers.0`;
the whole one, which servers build, `model.language_model.layers.0`. A server that has no module of a name adds
nothing, without an error: so every tensor of a written adapter must match a module of the class, built on `meta`.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qlora.adapters.adapter_keys import EMBEDDING_SUFFIXES, SAVED, SUFFIXES
from qlora.adapters.expert_keys import NESTED, is_target
from qlora.adapters.fit_to_base import paths_of_adapter, renamed
from qlora.adapters.peft_files import CONFIG, PREFIX, WEIGHTS, AdapterFile, read_tensors
from qlora.adapters.trainable_tokens import TENSOR_SUFFIX
from qlora.errors import AdapterError, BaseModelError
from qlora.model.meta_model import read_config
from qlora.model.module_tree import decoder_of, path_of
from qlora.model.wrapper_models import build_whole_class
from qlora.utils.atomic_files import read_json

ENDS = (*SUFFIXES.values(), *EMBEDDING_SUFFIXES.values(), TENSOR_SUFFIX)


def reader_class(base_folder: Path) -> nn.Module:
    """The class that PEFT adds an adapter to, on `meta`."""
    return build_whole_class(read_config(base_folder))


def served_class(base_folder: Path) -> nn.Module:
    """The class that servers build, on `meta`; PEFT's where transformers has none of that name."""
    config = read_config(base_folder)
    name = next(iter(read_json(base_folder / "config.json").get("architectures") or []), None)
    try:
        return build_whole_class(config, name)
    except BaseModelError:
        return build_whole_class(config)


def with_names_of(served: nn.Module, trained: nn.Module, file: AdapterFile) -> AdapterFile:
    """An adapter of the class `trained` under the module names of the class `served`."""
    before, after = _end_paths(trained), _end_paths(served)
    paths = {path: _renamed_path(path, before, after) for path in paths_of_adapter(file)}
    if all(old == new for old, new in paths.items()):
        return file
    changed, names = renamed(file, paths), file.config.get("target_modules")
    if not isinstance(names, list) or not _match_exactly(names, served, {*changed.config["target_modules"]}):
        return changed
    return replace(changed, config={**changed.config, "target_modules": names})


def refuse_unmatched(folder: Path, served: nn.Module) -> None:
    """AdapterError if a tensor of the adapter in `folder` matches no module of the class, or one of another shape."""
    config = read_json(folder / CONFIG)
    shapes = {name: tuple(weight.shape) for name, weight in served.named_parameters(remove_duplicate=False)}
    unmatched = [
        f"{key} {list(tensor.shape)}"
        for key, tensor in read_tensors(folder / WEIGHTS).items()
        if not _matches(key.removeprefix(PREFIX), tensor, shapes, config)
    ]
    if unmatched:
        raise AdapterError(
            f"export: {len(unmatched)} tensors of the adapter match no module of {type(served).__name__}, the class "
            f"that loads it, which leaves them out without an error: {'; '.join(unmatched[:3])}. "
            "Nothing was written. Use --to merged."
        )


def _match_exactly(names: list[str], model: nn.Module, paths: set[str]) -> bool:
    """Whether PEFT finds these modules of a class by the names, and no others, such as those of a tower."""
    ends = tuple(f".{name}" for name in names)
    return {path for path, _ in model.named_modules() if f".{path}".endswith(ends)} == paths


def _end_paths(model: nn.Module) -> dict[str, str]:
    """Paths of the decoder and of the head, below which all adapted modules are."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    paths = {"decoder": path_of(model, decoder_of(model))}
    return paths | ({"head": path_of(model, head)} if head is not None else {})


def _renamed_path(path: str, before: Mapping[str, str], after: Mapping[str, str]) -> str:
    for end in before.keys() & after.keys():
        if path == before[end] or path.startswith(f"{before[end]}."):
            return after[end] + path.removeprefix(before[end])
    return path


def _matches(name: str, tensor: Tensor, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> bool:
    """Whether a tensor of that name in PEFT's format belongs to a matrix, a stack or a weight of `shapes`."""
    end = next((end for end in ENDS if name.endswith(end)), None)
    if end is None:
        return name.replace(SAVED, ".") in shapes
    path = name.removesuffix(end).replace(NESTED, "")
    stacks = (shapes[key] for key in shapes if key.rpartition(".")[0] == path and is_target(config, key))
    matrices = [shapes[f"{path}.weight"]] if f"{path}.weight" in shapes else [*stacks]
    if end == SUFFIXES["A"]:
        return any(tensor.shape[-1] in matrix for matrix in matrices)
    if end in (SUFFIXES["B"], SUFFIXES["magnitude"]):
        return any(len(tensor) in matrix for matrix in matrices)
    return bool(matrices)
