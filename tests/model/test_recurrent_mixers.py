"""Recurrent mixers in packed sequences: documents apart, recomputed alike, a leak caught, generation with a state."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.adapted_models import load_base, load_plain
from support.architectures import random_model, save_with_tokenizer
from torch import Tensor, nn

from qlora.data.batching.collate import Batch, collate
from qlora.data.batching.join import join_documents
from qlora.data.types import Branch, Example, Layout
from qlora.errors import DataError
from qlora.memory.activation_recompute import recompute
from qlora.model.document_batches import LARGEST_PADDING, SMALL_PADDING, batches_of, similar_lengths
from qlora.model.generate_tokens import generate, stream_tokens
from qlora.model.linear_layers import layers_left_out, linear_paths
from qlora.model.lm_head import Head, shares_prefixes
from qlora.model.recurrent_mixers import isolate_recurrent_mixers, mixers_of, recurrent_mixers
from qlora.training.loss import TokenLoss
from qlora.training.packing_probe import refuse_leaks

CPU = torch.device("cpu")
LENGTHS = (3, 30, 17, 9)
KINDS = ("qwen3_5_text", "mamba2", "falcon_h1", "lfm2", "bamba")


@pytest.fixture(scope="module")
def documents() -> list[Example]:
    draw = np.random.default_rng(0)
    ids = [draw.integers(40, 250, length).astype(np.int32) for length in LENGTHS]
    return [Example(f"{number}", values, values) for number, values in enumerate(ids)]


@pytest.fixture(scope="module")
def packed(documents: list[Example]) -> list[Example]:
    return [join_documents(documents[:3]), join_documents(documents[2:])]


def isolated(kind: str) -> Any:
    """A random model whose mixers keep documents apart."""
    model = random_model(kind).requires_grad_(False)
    assert isolate_recurrent_mixers(model) == len(mixers_of(model)) > 0
    return model


def test_documents_share_batches_of_limited_padding() -> None:
    lengths = np.random.default_rng(1).integers(1, 3000, 400).tolist()
    groups = similar_lengths(lengths)
    assert sorted(index for group in groups for index in group) == [*range(400)]
    assert len(groups) < 12
    for group in groups:
        sizes = [lengths[index] for index in group]
        padding = max(sizes) * len(sizes) - sum(sizes)
        assert sizes == sorted(sizes, reverse=True)
        assert padding <= max(SMALL_PADDING, LARGEST_PADDING * sum(sizes))


def test_cut_and_joined_values_are_the_same() -> None:
    layout = Layout(((0, 4, 300), (0,), (0, 1)), (650, 20, 2))
    batches = batches_of(layout, 650, CPU)
    assert batches and len(batches.tokens) > 1
    values = torch.arange(3 * 650).reshape(3, 650, 1)
    cut = batches.cut(values)
    assert [batch.shape[0] for batch in cut] == [2, 4]
    joined = batches.join(cut)
    for row, length in enumerate(layout.lengths):
        assert torch.equal(joined[row, :length], values[row, :length])
        assert bool((joined[row, length:] == values[row, length - 1]).all())  # padding
    assert batches_of(Layout(((0,), (0,)), (5, 3)), 5, CPU) is None


def test_a_prefix_tree_is_not_taken() -> None:
    model = isolated("lfm2")
    model.config._attn_implementation = "qlora_documents"
    assert not shares_prefixes(model) and shares_prefixes(random_model("llama")) is False
    with pytest.raises(ValueError, match="prefix trees"):
        batches_of(Layout(((0,),), (9,), ((Branch(5, 2),),)), 9, CPU)


@pytest.mark.parametrize("kind", KINDS)
def test_no_path_and_no_tensor_changes(kind: str) -> None:
    model = random_model(kind)
    names, tensors = [name for name, _ in model.named_modules()], dict(model.state_dict())
    paths = recurrent_mixers(model)
    isolate_recurrent_mixers(model)
    assert recurrent_mixers(model) == paths and isolate_recurrent_mixers(model) == len(paths)
    assert [name for name, _ in model.named_modules()] == names
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == {
        name: value.data_ptr() for name, value in tensors.items()
    }
    head = f"{paths[0]}.out_proj"
    model.set_submodule(head, nn.Identity())  # as an adapter replaces a matrix
    assert isinstance(model.get_submodule(paths[0]).out_proj, nn.Identity)


def plant_leak(model: Any) -> None:
    """Give the last mixer its class's own forward again."""
    mixer = mixers_of(model)[-1]
    mixer.__class__ = type(mixer).__mro__[2]


@pytest.mark.sample(of=2)
@pytest.mark.parametrize("kind", KINDS)
def test_a_mixer_that_joins_documents_is_caught(kind: str, packed: list[Example]) -> None:
    model = isolated(kind)
    error = refuse_leaks(TokenLoss(model), packed, torch.float32, CPU)
    assert error is not None and error < 1e-5
    plant_leak(model)
    with pytest.raises(DataError, match="packed documents attend to each other"):
        refuse_leaks(TokenLoss(model), packed, torch.float32, CPU)


def loss_and_gradient(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    embeddings = model.get_input_embeddings().weight.requires_grad_()
    loss = TokenLoss(model).train()(batch.input_ids, batch.labels, batch.position_ids, batch.layout)
    (gradient,) = torch.autograd.grad(loss, embeddings)
    return loss.detach(), gradient


@pytest.mark.sample(of=2)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_have_the_gradient_of_each_alone(
    kind: str, documents: list[Example], packed: list[Example]
) -> None:
    model = isolated(kind)
    loss, gradient = loss_and_gradient(model, collate(packed, 0))
    alone = [loss_and_gradient(model, collate([document], 0)) for document in (*documents[:3], *documents[2:])]
    assert float(loss) == pytest.approx(sum(float(value) for value, _ in alone), rel=1e-5)
    expected = torch.stack([grad for _, grad in alone]).sum(0)
    assert float((gradient - expected).abs().max()) < 1e-4 * float(expected.abs().max())


def test_recomputed_layers_have_the_same_documents(packed: list[Example]) -> None:
    model = isolated("qwen3_5_text")
    batch = collate(packed, 0)
    loss, gradient = loss_and_gradient(model, batch)
    recompute(model, None)
    again, recomputed = loss_and_gradient(model, batch)
    assert torch.equal(loss, again) and torch.equal(gradient, recomputed)
    assert all(mixer.batches is None for mixer in mixers_of(model))


def test_an_output_matrix_is_quantized_and_adapted_where_peft_can() -> None:
    for kind, adapted in (("bamba", True), ("mamba2", False)):
        model = random_model(kind)
        for _ in range(2):  # before and after the mixers were replaced
            path = f"{recurrent_mixers(model)[0]}.out_proj"
            assert path in linear_paths(model)
            assert (path not in layers_left_out(model)) == adapted
            isolate_recurrent_mixers(model)
    assert layers_left_out(model)[path] == "PEFT does not adapt it in this class"


@torch.no_grad()
def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """Without a cache."""
    ids = [*prompt]
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.sample(of=3)
@pytest.mark.parametrize("kind", [*KINDS, "recurrent_gemma"])
def test_generation_keeps_the_state_of_each_answer(kind: str) -> None:
    model = random_model(kind)
    draw = np.random.default_rng(1)
    prompts = [draw.integers(40, 250, length).tolist() for length in (5, 11, 2)]
    expected = [greedy(model, prompt, 5) for prompt in prompts]
    isolate_recurrent_mixers(model)
    base: Any = SimpleNamespace(model=model, stop_token_ids=(0,), device=CPU)
    assert generate(base, prompts, 5) == expected
    assert [[*stream_tokens(base, prompt, 5)] for prompt in prompts] == expected


def test_padding_changes_no_token(documents: list[Example]) -> None:
    head = Head(isolated("qwen3_5_text"))
    both, alone = (collate(examples, 0) for examples in (documents[:2], documents[:1]))
    states = [head.hidden_states(batch.input_ids, batch.position_ids, batch.layout)[0] for batch in (both, alone)]
    torch.testing.assert_close(states[0][: len(states[1])], states[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen3_5_text", "nemotron_h"])
def test_states_have_the_dtypes_that_transformers_gives_them(kind: str, tmp_path: Path) -> None:
    folder = save_with_tokenizer(random_model(kind), tmp_path)
    expected = {name: value.dtype for name, value in load_plain(folder, torch.bfloat16).named_parameters()}
    ours = dict(load_base(folder, "nf4", "bfloat16").model.named_parameters())
    kept = {name for name in expected if name in ours and not name.endswith("_proj.weight")}
    assert any("A_log" in name for name in kept) and any("conv1d" in name for name in kept)
    assert {name: ours[name].dtype for name in kept} == {name: expected[name] for name in kept}
