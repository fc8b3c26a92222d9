"""Lean attention modules make the calls of transformers' own, and are used where that is proved."""

from typing import Any

import pytest
import torch
from support.pretended_gpu import pretended_gpu
from support.tiny_models import FAMILIES
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora.model.lean_attention import LeanAttention, lean_attention_of, replace_attention

GPU = torch.device("cuda")
LEAN = [family for family in FAMILIES if family not in ("phi3", "gpt_neox")]
IDS = torch.arange(3, 43).view(2, 20)


def build(family: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = FAMILIES[family]()
    for name, value in settings.items():
        setattr(config, name, value)
    return AutoModelForCausalLM.from_config(config).requires_grad_(False)


def logits(model: Any, **options: Any) -> Tensor:
    return model(input_ids=IDS, **options).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", LEAN)
def test_a_lean_module_gives_the_bits_of_the_original(family: str) -> None:
    model = build(family)
    names = [name for name, _ in model.named_parameters()]
    expected = logits(model)
    assert replace_attention(model) == model.config.num_hidden_layers
    modules = [module for module in model.modules() if isinstance(module, LeanAttention)]
    assert torch.equal(logits(model), expected)  # on a CPU the original's forward runs
    for module in modules:
        module.fuses = False  # the lean one, by torch's own operators
    assert torch.equal(logits(model, use_cache=False), expected)
    assert [name for name, _ in model.named_parameters()] == names


@pytest.mark.parametrize(("family", "settings"), [
    ("phi3", {}), ("gpt_neox", {}), ("llama", {"attention_dropout": 0.1}),
])  # fmt: skip
def test_a_module_of_another_form_is_kept(family: str, settings: dict[str, Any]) -> None:
    assert replace_attention(build(family, **settings)) == 0


def test_a_module_that_makes_another_call_is_kept() -> None:
    module = build("llama").model.layers[0].self_attn

    class Scaled(type(module)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
            return super().forward(2 * hidden_states, **kwargs)

    assert lean_attention_of(module) is not None
    module.__class__ = Scaled
    assert lean_attention_of(module) is None


def test_generation_with_a_cache_gives_the_same_tokens_on_a_gpu() -> None:
    model = build("qwen3")
    expected = model.generate(IDS, max_new_tokens=5, do_sample=False)
    replace_attention(model)
    with pretended_gpu():
        model.to(GPU)
        assert torch.equal(model.generate(IDS.to(GPU), max_new_tokens=5, do_sample=False).cpu(), expected)
