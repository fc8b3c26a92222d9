"""Trainable tokens (`adapter.tokens`): rows of the embedding and the head that train; all others stay frozen.

The trained rows replace the base's, as in PEFT's `trainable_token_indices`; float32 master weights, cast where used.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora.adapters.modules_to_save import ModuleToSave
from qlora.errors import AdapterError
from qlora.model.module_tree import set_by_path

PARAMETER_SUFFIX = ".master.rows"  # end of the name of the trained parameter
TENSOR_SUFFIX = ".token_adapter.trainable_tokens_delta"  # end of the tensor's name in PEFT's file


class TokenRows(nn.Module):
    """Rows [N, I] that replace those of the sorted ids `index` [N]; the other rows are the frozen module's."""

    index: Tensor

    def __init__(self, frozen: nn.Module, index: Tensor, rows: nn.Parameter) -> None:
        super().__init__()
        self._frozen = [frozen]  # in a list, so that it is no part of this module
        self.register_buffer("index", index, persistent=False)
        self.rows = rows

    @property
    def weight(self) -> Tensor:
        """The frozen weight, without the trained rows."""
        return self._frozen[0].weight  # type: ignore[return-value]


class EmbeddingRows(TokenRows):
    """An embedding with trained rows."""

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [...] -> [..., I]."""
        embedding: Any = self._frozen[0]
        out: Tensor = embedding(ids)
        position = torch.searchsorted(self.index, ids).clamp(max=len(self.index) - 1)
        rows = F.embedding(position, self.rows).to(out.dtype)
        scale = getattr(embedding, "embed_scale", None)  # Gemma 3 keeps its factor in the embedding
        rows = rows if scale is None else rows * scale.to(out.dtype)
        return torch.where((self.index[position] == ids)[..., None], rows, out)


class HeadRows(TokenRows):
    """A head with trained rows."""

    def forward(self, x: Tensor) -> Tensor:
        """X [..., I] -> logits [..., V]."""
        logits: Tensor = self._frozen[0](x)
        return logits.index_copy(-1, self.index, F.linear(x, self.rows.to(x.dtype)))


def token_ids(tokenizer: Any, tokens: Sequence[str | int], rows: int) -> list[int]:
    """The sorted ids of tokens, which are texts or ids. AdapterError for an unknown text, or an id beyond the rows."""
    vocabulary, ids = tokenizer.get_vocab(), list[int]()
    for token in tokens:
        number = vocabulary.get(token) if isinstance(token, str) else token
        if isinstance(token, str) and number is not None and number >= rows:
            raise AdapterError(
                f"adapter.tokens: {token!r} (id {number:,}) is a token of the tokenizer, but has no row in this base, "
                f"which has {rows:,} rows. Use adapter.new_tokens, which adds a row and trains it."
            )
        if number is None or not 0 <= number < rows:
            spare = sorted(text for text in vocabulary if "reserved" in text or "unused" in text)[:3]
            hint = f" Spare ones here: {', '.join(spare)}." if spare else ""
            raise AdapterError(
                f"adapter.tokens: {token!r} is not a token of this base, which has {rows:,} rows. Allowed: its texts "
                f"and ids; adapter.new_tokens adds others.{hint}"
            )
        if number in ids:
            raise AdapterError(f"adapter.tokens: {token!r} occurs twice.")
        ids.append(number)
    return sorted(ids)


def train_token_rows(model: nn.Module, ids: Sequence[int]) -> list[str]:
    """Make the rows of `ids` trainable in the embedding and the head: the same rows where these are tied."""
    ends = embedding_and_head(model)
    if any(isinstance(module, ModuleToSave) for module in ends.values()):
        raise AdapterError("adapter.tokens: adapter.save_modules trains the whole matrix already. Remove one of them.")
    shared: dict[int, nn.Parameter] = {}
    for path, module in ends.items():
        weight: Tensor = module.weight  # type: ignore[assignment]
        index = torch.tensor(list(ids), device=weight.device)
        key = id(weight)
        if key not in shared:
            shared[key] = nn.Parameter(weight.detach()[index].to(torch.float32))
        set_by_path(model, path, ModuleToSave(module, _with_rows(module, index, shared[key])))
    return list(ends)


def token_rows(model: nn.Module) -> dict[str, TokenRows]:
    """Path -> trained rows; a head that shares them with the embedding is left out, as in PEFT's file."""
    modules: dict[str, TokenRows] = {}
    for path, module in model.named_modules():
        master = getattr(module, "master", None)
        if isinstance(master, TokenRows) and all(master.rows is not other.rows for other in modules.values()):
            modules[path] = master
    return modules


def trainable_token_indices(model: nn.Module) -> dict[str, list[int]] | None:
    """The value of PEFT's `trainable_token_indices`: module name -> ids."""
    return {path.rpartition(".")[2]: module.index.tolist() for path, module in token_rows(model).items()} or None


def build_token_rows(
    model: nn.Module, config: Mapping[str, Any], rows: Mapping[str, Tensor]
) -> tuple[dict[str, ModuleToSave], list[str]]:
    """Modules with the rows of a file, path -> [N, I] in the order of its config; and why they don't fit this base."""
    ends, indices = embedding_and_head(model), config.get("trainable_token_indices") or {}
    first = next(iter(ends))
    by_name = indices if isinstance(indices, dict) else {first.rpartition(".")[2]: indices}
    modules: dict[str, ModuleToSave] = {}
    for path, values in rows.items():
        ids = next((numbers for name, numbers in by_name.items() if f".{path}".endswith(f".{name}")), None)
        problem = _rows_problem(path, ends.get(path), ids, values)
        if problem:
            return {}, [problem]
        weight: Tensor = ends[path].weight  # type: ignore[assignment]
        order = torch.tensor(ids).argsort()
        parameter = nn.Parameter(values[order].to(weight.device, weight.dtype), requires_grad=False)
        for other, module in ends.items():
            if other == path or (other not in rows and module.weight is weight):
                index = torch.tensor(ids)[order].to(weight.device)
                modules[other] = ModuleToSave(module, _with_rows(module, index, parameter))
    return modules, []


def _rows_problem(path: str, module: Any, ids: Any, values: Tensor) -> str | None:
    """Why `values` can't be rows of this module, or None."""
    if module is None or isinstance(module, ModuleToSave):
        return f"{path} is not an embedding or head of this base"
    height, width = module.weight.shape
    valid = isinstance(ids, list) and all(type(number) is int and 0 <= number < height for number in ids)
    if not valid or len(set(ids)) != len(ids):
        return f"{path}: trainable_token_indices must be different ids below {height}"
    if tuple(values.shape) != (len(ids), width) or not values.is_floating_point() or not values.isfinite().all():
        return f"{path} has rows {list(values.shape)}, needed: {[len(ids), width]} finite numbers"
    return None


def embedding_and_head(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> the embedding and the head, in this order."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
    paths = {id(module): path for path, module in model.named_modules()}
    return {paths[id(end)]: end for end in ends if end is not None}


def _with_rows(module: nn.Module, index: Tensor, rows: nn.Parameter) -> TokenRows:
    return (EmbeddingRows if isinstance(module, nn.Embedding) else HeadRows)(module, index, rows)
