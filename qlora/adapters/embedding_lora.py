"""LoRA on the embedding and the head, and a changed vocabulary: read from PEFT's files as whole weights.

    embedding [V, I]   W + s (B A)^T, with A [R, V] and B [I, R]; DoRA scales its columns
    head [V, I]        W + s B A, with A [R, I] and B [V, R]; DoRA scales its rows

W is the base's own, or the one in the file: PEFT writes it beside such an update, with its rows for new tokens.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qlora.adapters.dora import scale_rows
from qlora.adapters.expert_keys import target_fields
from qlora.adapters.peft_config import module_settings
from qlora.adapters.peft_files import AdapterFile
from qlora.adapters.trainable_tokens import embedding_and_head
from qlora.errors import AdapterError


@torch.no_grad()
def fold_embedding_and_head(file: AdapterFile, model: nn.Module) -> AdapterFile:
    """The file with whole weights in place of updates of `model`'s embedding and head; without them `file` itself.

    AdapterError if an update does not fit its module, or a weight of the base belongs to no update.
    """
    ends: Mapping[str, Any] = embedding_and_head(model)
    _refuse_unused(file, ends)
    trained = [path for path in file.rows if path in file.base_weights]
    updated = [path for path in ends if path in file.embeddings or path in file.pairs]
    if not trained and not updated:
        return file
    modules = dict(file.modules)
    for path in trained:
        modules[f"{path}.weight"] = _with_rows(file, path)
    for path in updated:
        weight = file.base_weights.get(path, ends[path].weight)
        modules[f"{path}.weight"] = _updated(file, path, weight.to("cpu", torch.float32))
        for tied in (other for other in ends if ends[other].weight is ends[path].weight and path in file.base_weights):
            modules.setdefault(f"{tied}.weight", file.base_weights[path])  # it may have rows for new tokens
        if getattr(ends[path], "bias", None) is not None:
            modules.setdefault(f"{path}.bias", ends[path].bias.detach())
    rows = {path: values for path, values in file.rows.items() if path not in trained}
    pairs = {path: pair for path, pair in file.pairs.items() if path not in ends}
    magnitudes = {path: magnitude for path, magnitude in file.magnitudes.items() if path not in ends}
    config = {**file.config, **_fields(file, modules, pairs, rows)}
    return replace(
        file, pairs=pairs, magnitudes=magnitudes, modules=modules, rows=rows, embeddings={}, base_weights={},
        config=config, is_changed=True,
    )  # fmt: skip


def _updated(file: AdapterFile, path: str, weight: Tensor) -> Tensor:
    """W [V, I] with the update of an embedding or a head, float32."""
    is_embedding = path in file.embeddings
    a, b = (side.float() for side in (file.embeddings if is_embedding else file.pairs)[path])
    matrix = weight.t() if is_embedding else weight
    shapes = [list(a.shape), list(b.shape)]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or (b.shape[0], a.shape[1]) != matrix.shape:
        problem = f"{path} has A {shapes[0]} and B {shapes[1]}, the base's matrix is {list(weight.shape)}"
        raise AdapterError(f"{file.folder}: does not fit this base: {problem}.")
    scaling = module_settings(file.config, path, a.shape[0]).scaling
    updated = matrix + scaling * (b @ a)
    magnitude = file.magnitudes.get(path)
    if magnitude is not None and magnitude.shape != updated.shape[:1]:
        problem = f"{path} has a magnitude {list(magnitude.shape)}, needed: {list(updated.shape[:1])}"
        raise AdapterError(f"{file.folder}: does not fit this base: {problem}.")
    updated = updated if magnitude is None else scale_rows(updated, magnitude.float())
    return (updated.t() if is_embedding else updated).contiguous()


def _with_rows(file: AdapterFile, path: str) -> Tensor:
    """The weight [V, I] that the file holds for `path`, with its trained rows."""
    weight, rows = file.base_weights[path], file.rows[path]
    indices = file.config.get("trainable_token_indices")
    by_name = indices if isinstance(indices, dict) else {"": indices}
    ids = next(
        (numbers for name, numbers in by_name.items() if path.endswith(name)), next(iter(by_name.values()), None)
    )
    if not isinstance(ids, list) or not all(type(number) is int and 0 <= number < len(weight) for number in ids):
        raise AdapterError(f"{file.folder}: trainable_token_indices must be ids below {len(weight):,}.")
    if rows.shape != (len(ids), *weight.shape[1:]):
        raise AdapterError(f"{file.folder}: {path} has rows {list(rows.shape)}, needed: {[len(ids), weight.shape[1]]}.")
    return weight.float().index_copy(0, torch.tensor(ids), rows.float())


def _refuse_unused(file: AdapterFile, ends: Mapping[str, Any]) -> None:
    """AdapterError for an embedding's update, or a weight of the base, at any other module."""
    other = next((path for path in [*file.embeddings, *file.base_weights] if path not in ends), None)
    if other:
        kind = "LoRA on an embedding" if other in file.embeddings else "a weight of the base"
        raise AdapterError(
            f"{file.folder}: {other} holds {kind}, which is only read for this base's {' and '.join(ends)}. Write the "
            "adapter alone: save_pretrained(FOLDER, save_embedding_layers=False)."
        )


def _fields(
    file: AdapterFile, modules: Mapping[str, Tensor], pairs: Mapping[str, Any], rows: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The fields of the config that name what is adapted."""
    saved = {*(file.config.get("modules_to_save") or ()), *(name.rpartition(".")[0] for name in modules)}
    filters = {"layers_to_transform": None, "layers_pattern": None, "exclude_modules": None}
    tokens = file.config.get("trainable_token_indices") if rows else None
    targets = target_fields(file.config, {path: path for path in pairs})
    return {**filters, **targets, "modules_to_save": sorted(saved), "trainable_token_indices": tokens}
