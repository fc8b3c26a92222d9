"""A foreign adapter made to fit a base: module paths as in this base, no changed start, whole weights at the ends.

The result can be attached, merged, and written as PEFT's format again.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from qlora.adapters.changed_base import OriginalWeights, restore_base
from qlora.adapters.embedding_lora import fold_embedding_and_head
from qlora.adapters.expert_keys import renamed_in_patterns, target_fields
from qlora.adapters.master_weights import trainable_modules
from qlora.adapters.old_expert_layout import with_current_layout
from qlora.adapters.peft_config import module_settings
from qlora.adapters.peft_files import CONFIG, AdapterFile
from qlora.adapters.peft_starts import changed_start
from qlora.adapters.trainable_tokens import embedding_and_head
from qlora.errors import AdapterError
from qlora.model.linear_layers import frozen_linears
from qlora.model.new_tokens import resize_vocabulary
from qlora.utils.progress import ProgressReporter

OUTER = ("base_model", "model", "module", "language_model")  # modules around a decoder, which classes nest differently
T = TypeVar("T")
Log = Callable[[str], None]


def fit_to_base(file: AdapterFile, model: nn.Module, originals: OriginalWeights, log: Log) -> AdapterFile:
    """The adapter for `model`, without adapters; each change is logged in a line.

    originals: the base's weights before quantization. AdapterError if a start, or an update of embedding or head, can't
    be read.
    """
    file = with_current_layout(_with_paths_of(model, file, log), model, log)
    start = changed_start(file.folder / CONFIG, file.config)
    if start:
        log(
            f"{file.folder}: its start ({start}) changed the base: what it subtracted is computed again from "
            f"{len(file.pairs)} matrices of the base; `qlora export --to adapter` writes the result"
        )
        device = next(model.parameters()).device
        file = restore_base(file, originals, device, ProgressReporter(log, "computing the start", "matrices"))
    return _with_modules_named(_match_vocabulary(fold_embedding_and_head(file, model), model, log))


def _match_vocabulary(file: AdapterFile, model: Any, log: Log) -> AdapterFile:
    """Give `model` as many rows as the file's embedding and head have.

    AdapterError if the file has another number of rows for one of the two, and lacks the other.
    """
    ends: Mapping[str, Any] = embedding_and_head(model)
    weights = {path: file.modules[f"{path}.weight"] for path in ends if f"{path}.weight" in file.modules}
    sizes = {path: len(weight) for path, weight in weights.items()}
    before = len(model.get_input_embeddings().weight)
    rows = next((size for size in sizes.values() if size != before), _rows_of_trained_tokens(file, before))
    if rows is None or any(weight.shape[1:] != ends[path].weight.shape[1:] for path, weight in weights.items()):
        return file  # attaching refuses any other shape
    lacking = [path for path in ends if path not in weights] if weights else []
    if lacking and len({id(end.weight) for end in ends.values()}) > 1:
        raise AdapterError(
            f"{file.folder}: has {rows:,} rows of {next(iter(weights))}, this base has {before:,}, and those of "
            f"{lacking[0]} are in no file. Merge it in PEFT, where it was trained (merge_and_unload), or train it with "
            "both in modules_to_save."
        )
    resize_vocabulary(model, rows, before)
    log(f"{file.folder}: its vocabulary has {rows:,} rows, this base's {before:,}: those of the adapter are used")
    shared = {f"{path}.weight": next(iter(weights.values())) for path in lacking}
    return replace(file, modules={**file.modules, **shared})


def _with_paths_of(model: nn.Module, file: AdapterFile, log: Log) -> AdapterFile:
    """The file with the paths of `model` where only outer modules differ; else `file`, which attaching then refuses."""
    known = {*frozen_linears(model), *(path for path, _ in trainable_modules(model))}
    by_inner: dict[str, str] = {}
    for path in sorted(known):
        if by_inner.setdefault(_inner(path), path) != path:
            return file
    paths = {path: by_inner.get(_inner(path), path) for path in paths_of_adapter(file)}
    changed = [(old, new) for old, new in paths.items() if old != new]
    if not changed or not known.issuperset(paths.values()) or len(set(paths.values())) < len(paths):
        return file
    log(f"{file.folder}: {len(changed)} modules have other names than in this base: {changed[0][0]} is {changed[0][1]}")
    return renamed(file, paths)


def _rows_of_trained_tokens(file: AdapterFile, before: int) -> int | None:
    """The rows that a base of `before` rows needs for an adapter that trains all rows of its new tokens; else None."""
    indices = file.config.get("trainable_token_indices")
    by_name = list(indices.values()) if isinstance(indices, dict) else [indices]
    ids = {number for numbers in by_name if isinstance(numbers, list) for number in numbers if type(number) is int}
    added = {number for number in ids if number >= before}
    return max(added) + 1 if file.rows and added and added == {*range(before, before + len(added))} else None


def _with_modules_named(file: AdapterFile) -> AdapterFile:
    """The file with all its whole weights in modules_to_save: PEFT leaves those out that it writes by itself."""
    names = [*(file.config.get("modules_to_save") or ())]
    paths = dict.fromkeys(path for (path, _, _), _ in _split_names(file.modules))
    missing = [path for path in paths if not path.endswith(tuple(names))] if names else [*paths]
    if not missing:
        return file
    return replace(file, config={**file.config, "modules_to_save": names + missing}, is_changed=True)


def renamed(file: AdapterFile, paths: Mapping[str, str]) -> AdapterFile:
    """The adapter with other module paths, which its config names one by one. paths: every old path -> new path."""

    def with_new_paths(values: Mapping[str, T]) -> dict[str, T]:
        return {paths[path]: value for path, value in values.items()}

    modules = {f"{paths[path]}.{leaf}": value for (path, _, leaf), value in _split_names(file.modules)}
    filters = {"layers_to_transform": None, "layers_pattern": None, "exclude_modules": None}
    return replace(
        file,
        pairs=with_new_paths(file.pairs),
        magnitudes=with_new_paths(file.magnitudes),
        modules=modules,
        rows=with_new_paths(file.rows),
        embeddings=with_new_paths(file.embeddings),
        base_weights=with_new_paths(file.base_weights),
        config={
            **file.config,
            **filters,
            **_patterns(file, paths),
            **target_fields(file.config, {path: paths[path] for path in file.pairs}),
        },
        is_changed=True,
    )


def _patterns(file: AdapterFile, paths: Mapping[str, str]) -> dict[str, Any]:
    """Rank and alpha by new path: the keys of the file's patterns are for its own paths."""
    if not any(file.config.get(key) for key in ("rank_pattern", "alpha_pattern")):
        return {}
    settings = {
        renamed_in_patterns(file.config, path, paths[path]): module_settings(file.config, path, a.shape[0])
        for path, (a, _) in file.pairs.items()
    }
    return {
        "rank_pattern": {path: layer.rank for path, layer in settings.items()},
        "alpha_pattern": {path: layer.alpha for path, layer in settings.items()},
    }


def _split_names(modules: Mapping[str, T]) -> Iterator[tuple[tuple[str, str, str], T]]:
    """Names of weights as path, dot and leaf, with the weights."""
    return ((name.rpartition("."), value) for name, value in modules.items())


def paths_of_adapter(file: AdapterFile) -> list[str]:
    """The paths of all modules that the adapter has a tensor of."""
    modules = (path for (path, _, _), _ in _split_names(file.modules))
    return [*dict.fromkeys([*file.pairs, *file.embeddings, *file.base_weights, *file.rows, *modules])]


def _inner(path: str) -> str:
    """A path without the outer modules that it begins with."""
    parts = path.split(".")
    while len(parts) > 1 and parts[0] in OUTER:
        del parts[0]
    return ".".join(parts)
