"""The start-up check refuses a base that computes something else than its class, and names what differs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.architectures import save_architecture
from support.small_runs import recipe_of
from torch import Tensor, nn

from qlora.errors import BaseModelError
from qlora.model import Model
from qlora.model.attention import DOCUMENT_ATTENTION
from qlora.model.class_reference import build_reference
from qlora.model.load_base import load
from qlora.model.module_tree import set_by_path
from qlora.quant import Quant, build_quantizer
from qlora.quant.dense_linear import DenseLinear
from qlora.quant.linear import FrozenLinear
from qlora.runs.memory_setup import load_base
from qlora.training.base_check import check_base
from qlora.training.base_trace import SEQUENCES, TOKENS

Zoo = Callable[..., Path]
Change = Callable[[Any], Any]


def loaded(folder: Path, kind: str = "dense", dtype: str = "float32") -> Any:
    quantizer = build_quantizer(Quant(kind=kind))
    return load(Model(name=str(folder), dtype=dtype), quantizer, torch.device("cpu")).model


class Scaled(nn.Module):
    """A module whose result is multiplied; it has the parameters of the original."""

    def __init__(self, original: nn.Module, factor: float) -> None:
        super().__init__()
        self._parameters = original._parameters
        self._original, self.factor = [original], factor

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._original[0](*args, **kwargs) * self.factor  # type: ignore[no-any-return]


class WithoutBias(DenseLinear):
    """A frozen layer whose kernel forgets the bias."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight(x.dtype).T


def scale_head(model: Any) -> None:
    model.lm_head = Scaled(model.lm_head, 1.06)


def untie_head(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight * 1.1, requires_grad=False)


def forget_bias(model: Any) -> None:
    path = "model.layers.1.mlp.up_proj"
    layer = model.get_submodule(path)
    set_by_path(model, path, WithoutBias(layer.weight(torch.float32), layer.bias))


def forget_norm_epsilon(model: Any) -> None:
    model.model.layers[1].input_layernorm._original[0].variance_epsilon = 30.0


def drop_layer(model: Any) -> None:
    del model.model.layers[1]
    model.config.num_hidden_layers = 2


FIRST, SECOND = "layer 1 of 2 differs from transformers' class by", "layer 2 of 2 differs from transformers' class by"
LOGITS = "its logits differ from those of transformers' class by"
CHANGES: dict[str, tuple[str, Change, str]] = {  # fault -> base, change of the loaded model, message
    "scale of the head": ("llama", scale_head, LOGITS),
    "scale of the logits": ("granite", scale_head, LOGITS),
    "untied head": ("llama-tied-bias", untie_head, LOGITS),
    "scale of the embedding": ("gemma3", lambda model: model.model.embed_tokens.embed_scale.mul_(1.2), FIRST),
    "frequencies": ("llama", lambda model: model.model.rotary_emb.inv_freq.mul_(1.2), FIRST),
    "scale of the attention": ("llama", lambda model: set_scaling(model, 0.4), SECOND),
    "activation": ("llama", lambda model: setattr(model.model.layers[0].mlp, "act_fn", nn.GELU()), FIRST),
    "later tokens": ("llama", lambda model: see_later_tokens(model), FIRST),
    "norm": ("llama", forget_norm_epsilon, SECOND),
    "kernel of a layer": ("llama-tied-bias", forget_bias, SECOND),
    "missing layer": ("llama", drop_layer, "was loaded without model.layers.1.self_attn.q_proj.weight"),
    "module that fails": ("llama", lambda model: setattr(model.model, "norm", nn.Linear(3, 3)), "does not run"),
}


def set_scaling(model: Any, value: float) -> None:
    model.model.layers[1].self_attn.scaling = value


def see_later_tokens(model: Any) -> None:
    """The attention adds the mean over all tokens."""
    model.model.layers[0].self_attn.register_forward_hook(
        lambda module, args, output: (output[0] + output[0].mean(dim=1, keepdim=True), output[1])
    )


@pytest.mark.sample(of=4)
@pytest.mark.parametrize("fault", CHANGES)
def test_a_base_that_computes_something_else_is_refused(zoo: Zoo, fault: str) -> None:
    family, change, message = CHANGES[fault]
    model = loaded(zoo(family))
    lines: list[str] = []
    check_base(model, lines.append)
    assert len(lines) == 1 and "equal to transformers'" in lines[0]
    with torch.no_grad():
        change(model)
    with pytest.raises(BaseModelError) as caught:
        check_base(model, lines.append)
    text = str(caught.value)
    assert message in text and "\n" not in text and text.startswith("model: ") and text.endswith("Choose another base.")


@pytest.mark.parametrize("fault", ["scale of the head", "frequencies", "activation", "later tokens"])
def test_it_detects_the_same_in_bfloat16_and_in_4_bits(zoo: Zoo, fault: str) -> None:
    family, change, message = CHANGES[fault]
    model = loaded(zoo(family), "nf4", "bfloat16")
    check_base(model, lambda line: None)
    with torch.no_grad():
        change(model)
    with pytest.raises(BaseModelError, match=message):
        check_base(model, lambda line: None)


@pytest.mark.parametrize("weights", ["resident", "stream"])
@pytest.mark.parametrize("quant", [{"kind": "nf4", "double": True}, {"kind": "fp4"}, {"kind": "dense"}])
def test_a_quantized_and_a_streamed_base_agree(zoo: Zoo, tmp_path: Path, quant: dict[str, Any], weights: str) -> None:
    lines: list[str] = []
    recipe = recipe_of(zoo("qwen2"), tmp_path / "rows", tmp_path, f"memory.weights={weights}", quant=quant)
    model = load_base(recipe, torch.device("cpu"), None, lines.append).model
    assert any("equal to transformers' Qwen2ForCausalLM" in line for line in lines)
    layers = [layer for layer in model.modules() if isinstance(layer, FrozenLinear)]
    assert all(bool(layer.fetch) == (weights == "stream") for layer in layers)
    model.model.rotary_emb.inv_freq.mul_(1.2)
    with pytest.raises(BaseModelError, match=FIRST):
        check_base(model, lines.append)


def test_it_leaves_no_trace_in_the_model(zoo: Zoo) -> None:
    model = loaded(zoo("gemma3"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = dict(model.named_modules())
    state = torch.random.get_rng_state()
    check_base(model, lambda line: None)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert dict(model.named_modules()) == modules and not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules.values())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("family", ["llama", "llama-tied-bias", "gemma3"])
def test_the_reference_has_no_weights_of_its_own(zoo: Zoo, family: str) -> None:
    """So the check takes the activations of 24 tokens, less than a step, and the memory plan needs no component."""
    model = loaded(zoo(family), "nf4")
    reference = build_reference(model)
    own = {id(parameter) for parameter in model.parameters()}
    assert all(id(parameter) in own for parameter in reference.parameters())
    linears = [module for module in reference.modules() if isinstance(module, nn.Linear)]
    assert len(linears) == 1  # the head; the others are dequantized on each use
    assert sum(buffer.nbytes for buffer in reference.buffers()) < 2**12
    assert SEQUENCES * TOKENS == 24


def test_layers_that_do_not_pass_their_window_get_another_kernel(zoo: Zoo) -> None:
    model, lines = loaded(zoo("mistral")), list[str]()
    assert model.config._attn_implementation == DOCUMENT_ATTENTION
    for layer in model.model.layers:
        layer.self_attn.config.sliding_window = 7
    model.model.config.sliding_window = 7
    for layer in model.model.layers:
        layer.self_attn.config = type(model.config)(**model.config.to_dict() | {"sliding_window": None})
        layer.self_attn.config._attn_implementation = DOCUMENT_ATTENTION
    check_base(model, lines.append)
    assert model.config._attn_implementation == "sdpa"
    assert "their window of 7 tokens" in lines[0]


def test_a_buffer_that_neither_class_nor_files_set_is_refused(tmp_path: Path) -> None:
    """The report's case: Apertus keeps numbers of its activation in buffers, which the loader did not read."""
    folder = save_architecture(tmp_path / "apertus", "apertus", 10**6)
    assert float(loaded(folder).model.layers[0].mlp.act_fn.beta) == pytest.approx(0.5, abs=0.3)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.act_fn.beta"
    assert torch.equal(loaded(folder).get_buffer(name), tensors.pop(name))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BaseModelError, match=r"no value for the buffers model\.layers\.0\.mlp\.act_fn\.beta"):
        loaded(folder)


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"),
], ids=str)  # fmt: skip
def test_running_out_of_memory_is_no_fault_of_the_base(zoo: Zoo, error: RuntimeError) -> None:
    model = loaded(zoo("llama"))

    def fail(*_: Any) -> None:
        raise error

    model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError) as caught:
        check_base(model, lambda line: None)
    assert caught.value is error
