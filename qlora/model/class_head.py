"""What a class does between its decoder and its logits: its own forward, run with given hidden states.

Most classes compute  softcap * tanh(scale * (h W^T) / softcap);  scale and cap are measured, since every class names
them differently. A class that does anything else (a transform before the head, a scale per token) keeps its forward.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qlora.model.module_tree import path_of

TOLERANCE = 1e-4  # relative, of a formula against the class's forward in float32
SMALL, MEDIUM, LARGE = 1e-3, 10.0, 1e6  # projections on which it is measured: slope at zero, between, limit


class HeadFormula(NamedTuple):
    """Logits = softcap * tanh(scale * z / softcap) of the projection z; without a soft cap scale * z."""

    scale: float = 1.0
    softcap: float | None = None

    def of(self, projected: Tensor) -> Tensor:
        """The logits of a projection."""
        scaled = projected * self.scale
        return torch.tanh(scaled / self.softcap) * self.softcap if self.softcap else scaled


class ClassLogits:
    """Hidden states [N, I] to logits [N, V] by the class's own forward, in which only the decoder is replaced."""

    def __init__(self, model: nn.Module, decoder: nn.Module) -> None:
        self._stub = _Decoder(decoder)
        self._model = replaced(model, {path_of(model, decoder): self._stub})

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits, as the class returns them."""
        rows = hidden.reshape(1, -1, hidden.shape[-1])
        self._stub.hidden = rows
        ids = torch.zeros(rows.shape[:2], dtype=torch.long, device=hidden.device)
        forward = type(self._model).forward
        output = forward(self._model, **accepted(forward, input_ids=ids, use_cache=False))
        logits = output.logits if hasattr(output, "logits") else output[0]
        return logits.reshape(*hidden.shape[:-1], -1)  # type: ignore[no-any-return]


class _Output:
    """What a decoder returns: hidden states, and None for anything else."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: Any) -> Any:
        return getattr(self, index) if isinstance(index, str) else (self.last_hidden_state,)[index]

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.last_hidden_state,))

    def __len__(self) -> int:
        return 1

    def keys(self) -> tuple[str, ...]:
        """The names for `**output`."""
        return ("last_hidden_state",)


class _Stub(nn.Module):
    """Takes the place of a module and has its attributes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = [module]  # in a list, so that it is no submodule

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_module"][0], name)


class _Decoder(_Stub):
    """Returns given hidden states."""

    hidden: Tensor

    def forward(self, *_: Any, **__: Any) -> _Output:
        """The given hidden states."""
        return _Output(self.hidden)


class _Projection(_Stub):
    """Returns given values, and keeps its input."""

    def __init__(self, projection: nn.Module, values: Tensor) -> None:
        super().__init__(projection)
        self.values = self.input = values

    def forward(self, x: Tensor) -> Tensor:
        """The given values."""
        self.input = x
        return self.values


@torch.no_grad()
def measure_formula(model: nn.Module, decoder: nn.Module, projection: nn.Module) -> HeadFormula | None:
    """Scale and soft cap of a class's logits; None if they are no such function of the projection.

    Any exception means that the class can't be run this way.
    """
    weight: Tensor = projection.weight  # type: ignore[assignment]
    device = torch.device("cpu") if weight.is_meta else weight.device
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 3, weight.shape[1], generator=generator).to(device)
    noise = torch.randn(1, 3, weight.shape[0], generator=generator)
    values = (noise * torch.tensor([SMALL, MEDIUM, LARGE])[:, None]).to(device)
    stub = _Projection(projection, values)
    logits = ClassLogits(replaced(model, {path_of(model, projection): stub}), decoder)(hidden)
    factor = _ratio(stub.input, hidden)
    scales_bias = factor != 1 and getattr(projection, "bias", None) is not None
    if logits.shape != values.shape or factor is None or scales_bias:
        return None
    return _fitted(values, logits.float(), factor)


@torch.no_grad()
def runs_class_forward(model: Any, decoder: nn.Module) -> bool:
    """Whether a class's own forward computes logits of hidden states; if not, only the start-up check compares them."""
    embedding: Tensor = model.get_input_embeddings().weight
    width = model.config.get_text_config().hidden_size
    try:
        logits = ClassLogits(model, decoder)(embedding.new_zeros(2, width))
    except Exception:  # it needs more than hidden states
        return False
    return logits.shape == (2, model.get_output_embeddings().weight.shape[0])


def _ratio(after: Tensor, before: Tensor) -> float | None:
    """The number k with after = k before; None if there is none."""
    if after.shape != before.shape:
        return None
    if torch.equal(after, before):
        return 1.0
    factor = float((after.double() * before).sum() / before.double().square().sum())
    return factor if torch.allclose(after, before * factor, rtol=TOLERANCE, atol=1e-7) else None


def _fitted(values: Tensor, logits: Tensor, factor: float) -> HeadFormula | None:
    """Scale and soft cap of rows with small, medium and large values; `factor` multiplied the head's input."""
    small, large = values[0, 0].double(), logits[0, 2].abs().max()
    scale = float((logits[0, 0].double() * small).sum() / small.square().sum())
    capped = float(large) < TOLERANCE * abs(scale) * LARGE
    formula = HeadFormula(scale, float(large) if capped else None)
    if not torch.allclose(formula.of(values), logits, rtol=TOLERANCE, atol=TOLERANCE * SMALL * abs(scale)):
        return None
    return HeadFormula(scale * factor, formula.softcap)


def configured_formula(config: Mapping[str, Any]) -> HeadFormula:
    """Scale and soft cap under the names that most configurations use."""
    scale = float(config.get("logit_scale") or 1.0) / float(config.get("logits_scaling") or 1.0)
    return HeadFormula(scale, config.get("final_logit_softcapping"))


def exact(measured: HeadFormula, config: Mapping[str, Any]) -> HeadFormula:
    """The formula with the exact numbers of a configuration in place of measured ones."""
    configured = configured_formula(config)
    numbers = [float(value) for value in config.values() if type(value) in (int, float) and value > 0]
    scales = [configured.scale, 1.0, *numbers, *(1 / number for number in numbers)]
    scale = next((value for value in scales if _is_near(value, measured.scale)), measured.scale)
    if not measured.softcap:
        return HeadFormula(scale)
    caps = [cap for cap in (configured.softcap, *numbers) if cap]
    return HeadFormula(scale, next((cap for cap in caps if _is_near(cap, measured.softcap)), measured.softcap))


def _is_near(value: float, measured: float) -> bool:
    return abs(value - measured) < TOLERANCE / 10 * abs(value)


def replaced(model: nn.Module, modules: Mapping[str, nn.Module]) -> nn.Module:
    """A shallow copy of `model` with other modules at some paths; the rest is shared, and `model` is unchanged."""
    copies: dict[str, nn.Module] = {"": _shallow(model)}
    for path, module in modules.items():
        *parents, leaf = path.split(".")
        for depth in range(len(parents)):
            parent, name = ".".join(parents[: depth + 1]), parents[depth]
            if parent not in copies:
                above = copies[".".join(parents[:depth])]
                copies[parent] = above._modules[name] = _shallow(above._modules[name])
        copies[".".join(parents)]._modules[leaf] = module
    return copies[""]


def _shallow(module: Any) -> nn.Module:
    shallow: nn.Module = copy.copy(module)
    shallow.__dict__["_modules"] = dict(module._modules)
    return shallow


def accepted(forward: Callable[..., Any], **arguments: Any) -> dict[str, Any]:
    """Those of the arguments that a forward takes, by name or by `**kwargs`."""
    names = argument_names(forward)
    return {name: value for name, value in arguments.items() if names is None or name in names}


@lru_cache(maxsize=256)
def argument_names(forward: Callable[..., Any]) -> frozenset[str] | None:
    """Names of the arguments that a forward takes; None if it takes any."""
    parameters = inspect.signature(forward).parameters.values()
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    return None if takes_any else frozenset(parameter.name for parameter in parameters)
