"""What a step costs, counted rather than timed: bytes kept, matrices rebuilt, frozen products, graph breaks."""

from collections import Counter
from collections.abc import Callable, Iterator
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
from qlora.model.attention import NAME
from qlora.model.lean_modules import lean
from qlora.model.meta_model import linear_paths
from qlora.quant.nf4 import Nf4
from qlora.training.loss import TokenLoss

Zoo = Callable[..., Path]
HIDDEN, WIDE, RANK, TOKENS = 256, 688, 8, 96
MATRICES = 7  # of a layer: query, key, value, output, gate, up, down


def model_of(layers: int = 2, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A Llama of the usual proportions, frozen in 4 bits, adapters on all its matrices."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=HIDDEN, intermediate_size=WIDE, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=8,
    )  # fmt: skip
    model = LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation=NAME).requires_grad_(False)
    for path in linear_paths(model):
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Nf4().quantize(model.get_submodule(path).weight))
    lean(model)
    inject(model, Lora(RANK, 16.0), "all-linear", 0)
    return model.train()


def loss_of(model: nn.Module, rows: int = 1) -> Tensor:
    ids = torch.arange(rows * TOKENS).view(rows, TOKENS) % 128
    positions = torch.arange(TOKENS)[None].expand(rows, -1)
    return TokenLoss(model)(ids, ids, positions)  # type: ignore[no-any-return]


class Count(TorchDispatchMode):
    """Frozen products (both sides wider than the rank) and rebuilt matrices, by phase."""

    def __init__(self) -> None:
        super().__init__()
        self.phase, self.found = "forward", Counter[tuple[str, str]]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket._qualified_op_name
        if name == "qlora::dequantize_4bit":
            self.found[self.phase, "rebuilt"] += 1
        if name in ("aten::mm", "aten::addmm", "aten::addmm_") and min(args[-1].shape + args[-2].shape) > RANK:
            self.found[self.phase, "products"] += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def kept_by_layer(layer: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes of each storage that the layer's forward keeps for backward, parameters left out."""
    known = {each.untyped_storage().data_ptr() for each in layer.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    handles = (
        layer.register_forward_pre_hook(lambda *_: hooks.__enter__()),
        layer.register_forward_hook(lambda *_: hooks.__exit__(None, None, None)),
    )
    yield kept
    for handle in handles:
        handle.remove()


def test_a_layer_keeps_at_most_12_hidden_states_a_token() -> None:
    """PEFT keeps 23 with bfloat16 adapters, 39 after prepare_model_for_kbit_training (reference/performance.md 2.3)."""
    model = model_of()
    recompute(model, 0)
    with kept_by_layer(model.model.layers[1]) as kept:  # type: ignore[union-attr, index, arg-type]
        loss_of(model, rows=4)
    assert sum(kept.values()) <= 12 * 2 * HIDDEN * 4 * TOKENS


@pytest.mark.parametrize("recomputed", [0, 1, 2])
def test_every_matrix_is_rebuilt_and_multiplied_as_rarely_as_can_be(recomputed: int) -> None:
    """Once forward, once backward; a recomputed layer does all again but its last product, which nobody reads."""
    model = model_of()
    recompute(model, recomputed)
    with Count() as count:
        loss = loss_of(model)
        count.phase = "backward"
        loss.backward()  # type: ignore[no-untyped-call]
    head = 1  # the head's own product, forward and for its gradient
    embeddings_need_none = 3  # query, key and value of the first layer: nothing below them learns
    again = recomputed * (MATRICES - 1)
    assert count.found["forward", "rebuilt"] == 2 * MATRICES
    assert count.found["forward", "products"] == 2 * MATRICES + 2 * head
    assert count.found["backward", "rebuilt"] == 2 * MATRICES - embeddings_need_none + again
    assert count.found["backward", "products"] == 2 * MATRICES - embeddings_need_none + again


@pytest.mark.parametrize("recomputed", [0, 2])
def test_a_layer_compiles_without_a_graph_break_and_gives_the_same_gradients(recomputed: int) -> None:
    def gradients(compiled: bool) -> list[Tensor]:
        model = model_of(dtype=torch.float32)
        recompute(model, recomputed)
        if compiled:
            for layer in model.model.layers:  # type: ignore[union-attr]
                layer.compile(fullgraph=True, dynamic=True, backend="aot_eager")  # type: ignore[operator]
        with torch.no_grad():
            for number, each in enumerate(each for each in model.parameters() if each.requires_grad):
                each.normal_(0, 0.05, generator=torch.Generator().manual_seed(number))
        loss_of(model).backward()  # type: ignore[no-untyped-call]
        return [each.grad for each in model.parameters() if each.grad is not None]

    torch.compiler.reset()
    for plain, compiled in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)  # float32, operations in another order
