"""Norms and MLPs that save less for backward than transformers' own, where they give the same bits.

A frozen norm saves its input in the base's dtype, not float32 copies of it. A gated MLP saves gate(x) and up(x), not
their product. That is half of what transformers and PEFT save; row-wise arithmetic is recomputed in backward. On a GPU
a fused kernel computes it where it is right and faster (kernels/).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from qlora.model.kernels import gated_product, rms_norm
from qlora.model.module_tree import set_by_path
from qlora.utils.rematerialize import rowwise_checkpoint

CHECK_ROWS = 3  # of random numbers, on which a module and its lean version must agree in every bit


class LeanNorm(nn.Module):
    """A frozen norm over the last dimension: the original's forward, recomputed in backward, or its fused kernel."""

    fuses = False  # whether a fused kernel may run; the comparison with the original runs its own operators

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        # One dictionary of parameters for both modules: a move or a shard of them acts on both.
        self._parameters = norm._parameters
        self._original = [norm]  # in a list, so that it is not registered as a submodule

    def forward(self, x: Tensor) -> Tensor:
        """X [..., I] -> [..., I]."""
        norm = self._original[0]
        if any(parameter is not None and parameter.requires_grad for parameter in self._parameters.values()):
            return norm(x)  # type: ignore[no-any-return]
        form = rms_norm.form_for(norm, x) if self.fuses and x.is_cuda else None
        return rowwise_checkpoint(norm.forward, x) if form is None else rms_norm.rms_norm(x, norm.weight, form)  # type: ignore[arg-type]


def outputs_of(x: Tensor, *layers: nn.Module) -> Sequence[Tensor]:
    """layer(x) for each layer; on a GPU by one function where their class has `forward_together(x, layers)`."""
    together = getattr(layers[0], "forward_together", None) if x.is_cuda and not torch.compiler.is_compiling() else None
    outputs = together(x, layers) if together is not None else None  # None: it declines
    return [layer(x) for layer in layers] if outputs is None else outputs


class LeanMlp(nn.Module):
    """An MLP with the children of the original."""

    fuses = False

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        for name, child in mlp.named_children():
            self.add_module(name, child)

    def gated(self, function: Callable[..., Tensor], act: nn.Module, *sources: Tensor) -> Tensor:
        """act(gate) * up of the sources, by the fused kernel or by `function`."""
        kind = gated_product.kind_for(act, sources[0]) if self.fuses and sources[0].is_cuda else None
        return rowwise_checkpoint(function, *sources) if kind is None else gated_product.gated_product(kind, *sources)


class LeanGatedMlp(LeanMlp):
    """down(act(gate(x)) * up(x)); saves gate(x) and up(x)."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """X [..., I] -> [..., I]."""
        gate, up = outputs_of(x, self.gate_proj, self.up_proj)
        return self.down_proj(self.gated(self.product, self.act_fn, gate, up))  # type: ignore[no-any-return]

    def product(self, gate: Tensor, up: Tensor) -> Tensor:
        """act(gate) * up."""
        return self.act_fn(gate) * up  # type: ignore[no-any-return]


class LeanFusedMlp(LeanMlp):
    """The same with gate and up as the two halves of one matrix."""

    gate_up_proj: nn.Module
    down_proj: nn.Module
    activation_fn: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """X [..., I] -> [..., I]."""
        return self.down_proj(self.gated(self.product_of_halves, self.activation_fn, self.gate_up_proj(x)))  # type: ignore[no-any-return]

    def product_of_halves(self, gate_and_up: Tensor) -> Tensor:
        """act(first half) * second half."""
        gate, up = gate_and_up.chunk(2, dim=-1)
        return up * self.activation_fn(gate)  # type: ignore[no-any-return]


class LeanPlainMlp(LeanMlp):
    """down(act(up(x))); saves up(x)."""

    dense_h_to_4h: nn.Module
    dense_4h_to_h: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """X [..., I] -> [..., I]."""
        return self.dense_4h_to_h(rowwise_checkpoint(self.act, self.dense_h_to_4h(x)))  # type: ignore[no-any-return]


MLPS: dict[frozenset[str], Callable[[nn.Module], LeanMlp]] = {  # names of the children -> lean version
    frozenset({"gate_proj", "up_proj", "down_proj", "act_fn"}): LeanGatedMlp,
    frozenset({"gate_up_proj", "down_proj", "activation_fn"}): LeanFusedMlp,
    frozenset({"dense_h_to_4h", "dense_4h_to_h", "act"}): LeanPlainMlp,
}


def replace_with_lean(model: nn.Module, checked: dict[type, bool] | None = None) -> int:
    """Replace norms and MLPs of a loaded, frozen model by lean versions that agree in every bit; returns how many.

    Forward and backward run the operations of the originals, so that no number changes. `checked` caches the result of
    the check by class, for a model that is loaded layer by layer.
    """
    results: dict[type, bool] = {} if checked is None else checked

    def agrees(module: nn.Module, lean: nn.Module) -> bool:
        if type(module) not in results:
            results[type(module)] = _same_bits(module, lean)
        return results[type(module)]

    return replace_modules(model, agrees)


def replace_modules(model: nn.Module, accept: Callable[[nn.Module, nn.Module], bool]) -> int:
    """Replace every norm and MLP for which `accept(module, lean version)` is true; returns how many."""
    candidates = [(path, module, lean_version_of(module)) for path, module in model.named_modules()]
    replaced = 0
    for path, module, lean in candidates:
        if lean is None or not accept(module, lean):
            continue
        lean.fuses = True
        set_by_path(model, path, lean.train(module.training))
        replaced += 1
    return replaced


def lean_version_of(module: nn.Module) -> LeanNorm | LeanMlp | None:
    """The lean module with the same parameters; None unless `module` is a norm or MLP of a known form, not yet lean."""
    if type(module) in (LeanNorm, LeanGatedMlp, LeanFusedMlp, LeanPlainMlp):
        return None
    children = frozenset(name for name, _ in module.named_children())
    if children in MLPS:
        return MLPS[children](module)
    is_norm = type(module).__name__.endswith(("RMSNorm", "LayerNorm")) and not children
    return LeanNorm(module) if is_norm and len(list(module.parameters(recurse=False))) > 0 else None


@torch.no_grad()
def _same_bits(module: nn.Module, lean: nn.Module) -> bool:
    """Whether both give the same bits for random rows, in one call and row by row; False if one of them fails."""
    first = next(module.parameters())
    dtypes = [parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()]
    width = first.shape[-1] if isinstance(lean, LeanNorm) else _input_width(module)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, CHECK_ROWS, width, generator=generator).to(first.device, dtypes[0] if dtypes else torch.float32)
    try:
        expected, in_one_call = module(x), lean(x)
        row_by_row = torch.cat([lean(row) for row in x.split(1, dim=1)], dim=1)
    except Exception:  # a norm or an MLP that takes something else than rows
        return False
    # Only a CPU recomputes a few rows at a time: a GPU's sum over a row depends on the number of rows.
    rows_agree = isinstance(lean, LeanMlp) or x.device.type != "cpu" or torch.equal(expected, row_by_row)
    return torch.equal(expected, in_one_call) and rows_agree


def _input_width(mlp: nn.Module) -> int:
    """Input features of the first matrix of an MLP."""
    return int(next(child for child in mlp.children() if hasattr(child, "in_features")).in_features)  # type: ignore[arg-type]
