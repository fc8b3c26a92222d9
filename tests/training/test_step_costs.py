"""Costs of a step, counted, not timed: bytes saved for backward, dequantizations, frozen matmuls, graph breaks."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from qlora.adapters.inject import inject
from qlora.adapters.lora import Lora
from qlora.memory.activation_recompute import recompute
from qlora.model.attention import DOCUMENT_ATTENTION
from qlora.model.lean_modules import replace_with_lean
from qlora.model.linear_layers import linear_paths
from qlora.model.module_tree import set_by_path
from qlora.quant import Quant, build_quantizer
from qlora.training.loss import TokenLoss

Zoo = Callable[..., Path]
HIDDEN, INTERMEDIATE, RANK, TOKENS = 256, 688, 8, 96
FEW = ("q_proj", "v_proj", "down_proj")  # two with one input, and one alone: tracing takes seconds
MATRICES = 7  # of a layer: query, key, value, output, gate, up, down


def model_of(dtype: torch.dtype = torch.bfloat16, targets: str | Sequence[str] = "all-linear") -> nn.Module:
    """A small Llama of two layers of the usual proportions, frozen in 4 bits, with adapters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    model = LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation=DOCUMENT_ATTENTION)
    model.requires_grad_(False)
    for path in linear_paths(model):
        set_by_path(model, path, build_quantizer(Quant()).quantize(model.get_submodule(path).weight))
    replace_with_lean(model)
    inject(model, Lora(RANK, 16.0, 0.0), targets, 0)
    return model.train()


def loss_of(model: nn.Module, rows: int = 1) -> Tensor:
    ids = torch.arange(rows * TOKENS).view(rows, TOKENS) % 128
    positions = torch.arange(TOKENS)[None].expand(rows, -1)
    return TokenLoss(model)(ids, ids, positions)  # type: ignore[no-any-return]


class OperationCounter(TorchDispatchMode):
    """Counts frozen matmuls (all sizes above the adapter's rank) and dequantizations, by phase."""

    def __init__(self) -> None:
        super().__init__()
        self.phase, self.counts = "forward", Counter[tuple[str, str]]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket._qualified_op_name
        if name == "qlora::dequantize_4bit":
            self.counts[self.phase, "dequantized"] += 1
        if name in ("aten::mm", "aten::addmm", "aten::addmm_") and min(args[-1].shape + args[-2].shape) > RANK:
            self.counts[self.phase, "matmuls"] += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def saved_by_layer(layer: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes of each storage that the layer's forward saves for backward, without parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    handles = (
        layer.register_forward_pre_hook(lambda *_: hooks.__enter__()),
        layer.register_forward_hook(lambda *_: hooks.__exit__(None, None, None)),
    )
    yield saved
    for handle in handles:
        handle.remove()


def test_a_layer_saves_at_most_12_hidden_states_per_token() -> None:
    """PEFT saves 23 with bfloat16 adapters, 39 after prepare_model_for_kbit_training (reference/performance.md 2.3)."""
    model = model_of()
    recompute(model, 0)
    with saved_by_layer(model.model.layers[1]) as saved:  # type: ignore[union-attr, index, arg-type]
        loss_of(model, rows=4)
    assert sum(saved.values()) <= 12 * 2 * HIDDEN * 4 * TOKENS


@pytest.mark.sample(of=3)
@pytest.mark.parametrize("recomputed", [0, 1, 2])
def test_every_matrix_is_dequantized_and_multiplied_a_minimum_of_times(recomputed: int) -> None:
    """Once in forward, once in backward; a recomputed layer repeats all but its last matmul, whose output is unused."""
    model = model_of()
    recompute(model, recomputed)
    with OperationCounter() as counter:
        loss = loss_of(model)
        counter.phase = "backward"
        loss.backward()  # type: ignore[no-untyped-call]
    head = 1  # matmul of the head, in forward and for its gradient
    without_input_gradient = 3  # query, key and value of the first layer: nothing below them is trained
    repeated = recomputed * (MATRICES - 1)
    assert counter.counts["forward", "dequantized"] == 2 * MATRICES
    assert counter.counts["forward", "matmuls"] == 2 * MATRICES + 2 * head
    assert counter.counts["backward", "dequantized"] == 2 * MATRICES - without_input_gradient + repeated
    assert counter.counts["backward", "matmuls"] == 2 * MATRICES - without_input_gradient + repeated


@pytest.mark.sample(of=8)
@pytest.mark.parametrize("number", [0, 1])  # the first layer's input has no gradient
@pytest.mark.parametrize("recomputed", [0, pytest.param(2, marks=pytest.mark.slow)])  # 2 compiles both ways
@pytest.mark.parametrize(
    "targets", [FEW, pytest.param("all-linear", marks=pytest.mark.slow)], ids=lambda value: value[0]
)
def test_a_layer_compiles_without_graph_break_to_the_same_gradients(
    recomputed: int, number: int, targets: str | Sequence[str]
) -> None:
    def gradients(compiled: bool) -> list[Tensor]:
        model = model_of(torch.float32, targets)
        recompute(model, recomputed)
        if compiled:
            layer = model.model.layers[number]  # type: ignore[union-attr, index]
            layer.compile(fullgraph=True, dynamic=True, backend="aot_eager")  # type: ignore[operator]
        with torch.no_grad():
            for seed, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
                parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(seed))
        loss_of(model).backward()  # type: ignore[no-untyped-call]
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    torch.compiler.reset()
    for plain, compiled in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)  # float32, operations in another order
