"""Modules that train whole beside the low-rank updates (`adapter.save_modules`): a master beside each frozen one."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from qlora.adapters.inject import adapted, replace
from qlora.adapters.master_weights import master_of, trainable_modules
from qlora.adapters.target_modules import named_nearest
from qlora.errors import AdapterError


class SavedModule(nn.Module):
    """What the base had, and the trained module that acts in its place; `active = False` leaves the base alone."""

    def __init__(self, base: nn.Module, master: nn.Module) -> None:
        super().__init__()
        self.base, self.master, self.active = base, master, True

    @property
    def weight(self) -> Tensor:
        """The weight that acts: a loss looks at that of the head."""
        return (self.master if self.active else self.base).weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """As the module that acts."""
        return (self.master if self.active else self.base)(x)  # type: ignore[no-any-return]


def save(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Let the modules that `names` mean (paths or their ends) train whole; returns their paths.

    Embedding and head that are one tensor stay one: either name means both. AdapterError for a name that means no
    module that can train, an adapted layer, or one stored in 4 bits.
    """
    known = dict(trainable_modules(model))
    chosen = {path for name in names for path in _matching(known, list(adapted(model)), name)}
    shared: dict[int, nn.Parameter] = {}
    chosen |= _tied(model, known, chosen)
    paths = [path for path in known if path in chosen]
    for path in paths:
        replace(model, path, SavedModule(known[path], master_of(path, known[path], shared)))
    return paths


def saved_modules(model: nn.Module) -> dict[str, SavedModule]:
    """Path -> module that trains beside its frozen one, in the model's order."""
    return {path: module for path, module in model.named_modules() if isinstance(module, SavedModule)}


def whole_modules(model: nn.Module) -> dict[str, SavedModule]:
    """Those of them that have every weight of the frozen one."""
    return {path: module for path, module in saved_modules(model).items() if not hasattr(module.master, "rows")}


def saved_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Their weights by the names that the base gives them; a tied one under both of its names."""
    for path, module in whole_modules(model).items():
        yield from ((f"{path}.{name}", value) for name, value in module.master.named_parameters())


def written_names(model: nn.Module) -> list[str] | None:
    """What PEFT's `modules_to_save` must say: it takes every module whose path ends so, with or without a dot."""
    chosen = set(whole_modules(model))
    leaves = {path.rpartition(".")[2] for path in chosen}
    every = {path.removesuffix(".base") for path, _ in model.named_modules() if not path.endswith(".master")}
    reached = {path for path in every if path.endswith(tuple(leaves))}
    return sorted(leaves if reached == chosen else chosen) or None


def fitted_modules(model: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[dict[str, SavedModule], list[str]]:
    """SavedModules holding `tensors` (path.name -> values) in the base's dtype, and what does not fit this base."""
    known = dict(trainable_modules(model))
    made: dict[str, SavedModule] = {}
    problems: list[str] = []
    for path in dict.fromkeys(key.rpartition(".")[0] for key in tensors):
        if path not in known:
            problems.append(f"{path} is no embedding, norm or head here")
            continue
        master = master_of(path, known[path], {})
        own = {name: tensors.get(f"{path}.{name}") for name, _ in master.named_parameters()}
        odd = _odd(path, master, own)
        if odd:
            problems.append(odd)
            continue
        for name, value in own.items():
            dtype = next(known[path].parameters()).dtype
            setattr(master, name, nn.Parameter(value.to(_device(known[path]), dtype), requires_grad=False))  # type: ignore[union-attr]
        made[path] = SavedModule(known[path], master)
    return made, problems


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _odd(path: str, master: nn.Module, own: Mapping[str, Tensor | None]) -> str | None:
    """Why the tensors of one module can't be its weights, or None."""
    for name, wanted in master.named_parameters():
        value = own[name]
        if value is None:
            return f"{path}.{name} is missing"
        if value.shape != wanted.shape or not value.is_floating_point() or not torch.isfinite(value).all():
            return f"{path}.{name} is {list(value.shape)} of {value.dtype}, needed: {list(wanted.shape)} finite numbers"
    return None


def _tied(model: nn.Module, known: Mapping[str, nn.Module], chosen: set[str]) -> set[str]:
    """Embedding and head, if one of them is chosen and they are one tensor."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
    pair = {path for path, module in known.items() if any(module is end for end in ends)}
    return pair if pair & chosen and ends[1] is not None and ends[0].weight is ends[1].weight else set()


def _matching(known: Mapping[str, nn.Module], lowered: list[str], name: str) -> list[str]:
    found = [path for path in known if path == name or path.endswith(f".{name}")]
    if found:
        return found
    if any(path == name or path.endswith(f".{name}") for path in lowered):
        raise AdapterError(
            f"adapter.save_modules: {name!r} is adapted by adapter.targets already. Leave it out of one of the two."
        )
    hint, leaves = named_nearest(name, known)
    raise AdapterError(
        f"adapter.save_modules: {name!r} means no module that can train whole.{hint} Allowed here: "
        f"{leaves}, or the end of a path such as layers.0.input_layernorm."
    )
