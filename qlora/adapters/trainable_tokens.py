"""Rows of the embedding, and of the head, that train by themselves (`adapter.tokens`): all others stay frozen.

The rows trained replace the base's own, as PEFT's `trainable_token_indices` has it; float32 masters, cast where used.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora.adapters.inject import replace
from qlora.adapters.modules_to_save import SavedModule
from qlora.errors import AdapterError

ROWS = ".master.rows"  # how the parameter's name ends
SUFFIX = ".token_adapter.trainable_tokens_delta"


class TokenRows(nn.Module):
    """Rows [N, I] in the place of those that `index` [N] names, sorted; the other rows are the frozen module's."""

    index: Tensor

    def __init__(self, frozen: nn.Module, index: Tensor, rows: nn.Parameter) -> None:
        super().__init__()
        self._frozen = [frozen]  # in a list, so that it is no part of this module
        self.register_buffer("index", index, persistent=False)
        self.rows = rows

    @property
    def weight(self) -> Tensor:
        """The frozen weight beside the rows."""
        return self._frozen[0].weight  # type: ignore[return-value]


class EmbeddingRows(TokenRows):
    """An embedding some of whose rows are others."""

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [...] -> [..., I]."""
        embedding: Any = self._frozen[0]
        out: Tensor = embedding(ids)
        place = torch.searchsorted(self.index, ids).clamp(max=len(self.index) - 1)
        own = F.embedding(place, self.rows).to(out.dtype)
        scale = getattr(embedding, "embed_scale", None)  # Gemma 3 keeps its factor in the embedding
        own = own if scale is None else own * scale.to(out.dtype)
        return torch.where((self.index[place] == ids)[..., None], own, out)


class HeadRows(TokenRows):
    """A head some of whose rows are others."""

    def forward(self, x: Tensor) -> Tensor:
        """X [..., I] -> logits [..., V]."""
        logits: Tensor = self._frozen[0](x)
        return logits.index_copy(-1, self.index, F.linear(x, self.rows.to(x.dtype)))


def ids_of(tokenizer: Any, tokens: Sequence[str | int], rows: int) -> list[int]:
    """The ids that texts and ids mean, sorted. AdapterError for a text that is no token, or an id beyond the rows."""
    known, found = tokenizer.get_vocab(), list[int]()
    for token in tokens:
        number = known.get(token) if isinstance(token, str) else token
        if number is None or not 0 <= number < rows:
            spare = sorted(text for text in known if "reserved" in text or "unused" in text)[:3]
            hint = f" Spare ones here: {', '.join(spare)}." if spare else ""
            raise AdapterError(
                f"adapter.tokens: {token!r} is no token of this base, which has {rows:,} rows. Allowed: texts and ids "
                f"that it has; adapter.new_tokens adds others.{hint}"
            )
        if number in found:
            raise AdapterError(f"adapter.tokens: {token!r} is there twice.")
        found.append(number)
    return sorted(found)


def train_rows(model: nn.Module, ids: Sequence[int]) -> list[str]:
    """Let the rows of `ids` train in the embedding and the head: the same rows where these are one tensor."""
    ends = _ends(model)
    if any(isinstance(module, SavedModule) for module in ends.values()):
        raise AdapterError("adapter.tokens: adapter.save_modules trains the whole matrix already. Remove one of them.")
    shared: dict[int, nn.Parameter] = {}
    for path, module in ends.items():
        weight: Tensor = module.weight  # type: ignore[assignment]
        index = torch.tensor(list(ids), device=weight.device)
        key = id(weight)
        if key not in shared:
            shared[key] = nn.Parameter(weight.detach()[index].to(torch.float32))
        replace(model, path, SavedModule(module, _stand_in(module, index, shared[key])))
    return list(ends)


def row_modules(model: nn.Module) -> dict[str, TokenRows]:
    """Path -> rows that train there; a head that shares them with the embedding is left out, as in PEFT's file."""
    found: dict[str, TokenRows] = {}
    for path, module in model.named_modules():
        master = getattr(module, "master", None)
        if isinstance(master, TokenRows) and all(master.rows is not other.rows for other in found.values()):
            found[path] = master
    return found


def indices(model: nn.Module) -> dict[str, list[int]] | None:
    """PEFT's `trainable_token_indices`: by the name of the module."""
    return {path.rpartition(".")[2]: rows.index.tolist() for path, rows in row_modules(model).items()} or None


def fitted_rows(
    model: nn.Module, config: Mapping[str, Any], rows: Mapping[str, Tensor]
) -> tuple[dict[str, SavedModule], list[str]]:
    """SavedModules for the rows of a file, path -> [N, I] in the order of its config; and what does not fit here."""
    ends, said = _ends(model), config.get("trainable_token_indices") or {}
    first = next(iter(ends))
    named = said if isinstance(said, dict) else {first.rpartition(".")[2]: said}
    made: dict[str, SavedModule] = {}
    for path, values in rows.items():
        found = next((numbers for name, numbers in named.items() if f".{path}".endswith(f".{name}")), None)
        odd = _odd(path, ends.get(path), found, values)
        if odd:
            return {}, [odd]
        weight: Tensor = ends[path].weight  # type: ignore[assignment]
        order = torch.tensor(found).argsort()
        own = nn.Parameter(values[order].to(weight.device, weight.dtype), requires_grad=False)
        for other, module in ends.items():
            if other == path or (other not in rows and module.weight is weight):
                index = torch.tensor(found)[order].to(weight.device)
                made[other] = SavedModule(module, _stand_in(module, index, own))
    return made, []


def _odd(path: str, module: Any, found: Any, values: Tensor) -> str | None:
    """Why rows can't be some of this module's, or None."""
    if module is None or isinstance(module, SavedModule):
        return f"{path} is no embedding or head here"
    height, width = module.weight.shape
    fits = isinstance(found, list) and all(type(each) is int and 0 <= each < height for each in found)
    if not fits or len(set(found)) != len(found):
        return f"{path}: trainable_token_indices must be different ids below {height}"
    if tuple(values.shape) != (len(found), width) or not values.is_floating_point() or not values.isfinite().all():
        return f"{path} has rows {list(values.shape)}, needed: {[len(found), width]} finite numbers"
    return None


def _ends(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> the embedding and the head, in this order."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
    paths = {id(module): path for path, module in model.named_modules()}
    return {paths[id(end)]: end for end in ends if end is not None}


def _stand_in(module: nn.Module, index: Tensor, rows: nn.Parameter) -> TokenRows:
    return (EmbeddingRows if isinstance(module, nn.Embedding) else HeadRows)(module, index, rows)
