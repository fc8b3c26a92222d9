"""The gradient of a step does not depend on micro-batches, packing or recomputation; loss and gradient are correct."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.step_gradients import difference, gradients, job_of
from support.tiny_models import FAMILIES
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from qlora.adapters.inject import adapted
from qlora.data.batching.collate import collate
from qlora.data.batching.packing import pack
from qlora.data.types import IGNORED, Example
from qlora.training.job import Job
from qlora.training.loss import TokenLoss

Zoo = Callable[..., Path]


@pytest.fixture(scope="module")
def job(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Job:
    return job_of(zoo("llama"), tmp_path_factory.mktemp("gradients"))


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 4, 5])
def test_the_split_into_micro_batches_does_not_change_the_gradient(job: Job, micro_batch: int) -> None:
    lengths = {example.trained_tokens() for example in job.train_examples}
    assert len(lengths) > 3  # with equal lengths a mean of means would pass too
    # float32: sums of a few thousand products in another order
    assert difference(gradients(job, micro_batch=micro_batch), gradients(job, micro_batch=8)) <= 1e-6


def random_example(number: int, length: int, untrained: int, generator: np.random.Generator) -> Example:
    """Random tokens, of which the last ones are trained, at least one."""
    ids = generator.integers(5, 250, length).astype(np.int32)
    labels = ids.copy()
    labels[: min(untrained, length - 1)] = IGNORED
    return Example(f"example {number}", ids, labels)


@settings(max_examples=5, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(2, 30), st.integers(1, 29)), min_size=1, max_size=7),
    micro_batch=st.integers(1, 7),
    seed=st.integers(0, 99),
)
def test_any_split_of_any_examples_gives_the_same_gradient(
    job: Job, lengths: list[tuple[int, int]], micro_batch: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    examples = [random_example(number, *sizes, generator) for number, sizes in enumerate(lengths)]
    expected = gradients(job, train=examples, global_batch=len(examples), micro_batch=len(examples))
    split = gradients(job, train=examples, global_batch=len(examples), micro_batch=micro_batch)
    packed = gradients(job, train=pack(examples, 40), global_batch=len(examples), micro_batch=micro_batch)
    # Sums of other lengths, all in float32; with one trained token an example the split differs by up to 1.1e-6.
    assert difference(split, expected) <= 2e-6
    assert difference(packed, expected) <= 2e-6


@pytest.mark.sample(of=6)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_sequences_give_the_gradient_of_their_documents(zoo: Zoo, family: str, tmp_path: Path) -> None:
    """Attention windows of 32 tokens, shorter and longer documents, several of them in a sequence."""
    job, generator = job_of(zoo(family), tmp_path), np.random.default_rng(0)
    documents = [
        random_example(n, length, length // 2, generator) for n, length in enumerate((9, 50, 33, 12, 40, 7, 64, 20))
    ]
    packed = pack(documents, 100)
    assert len(packed) == 3 and max(len(example.boundaries) for example in packed) >= 2
    separate = gradients(job, train=documents, micro_batch=1)
    for micro_batch in (1, 3):
        assert difference(gradients(job, train=packed, micro_batch=micro_batch), separate) <= 3e-6


@pytest.mark.sample(of=6, every=("kind", "dropout"))
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    ("family", "kind"),
    [*((family, "lora") for family in ("llama-tied-bias", "gemma2", "gpt_neox", "phi3")), ("llama-tied-bias", "dora")],
)
def test_recomputation_does_not_change_a_bit(zoo: Zoo, family: str, kind: str, dropout: float, tmp_path: Path) -> None:
    results = {}
    for layers in ("none", "1", "all"):
        (tmp_path / layers).mkdir()
        options = (f"memory.recompute={layers}", f"adapter.dropout={dropout}", f"adapter.kind={kind}")
        job = job_of(zoo(family), tmp_path / layers, *options, records=3)
        recomputed = [
            m.gradient_checkpointing for m in job.model.modules() if hasattr(type(m), "gradient_checkpointing")
        ]
        assert sum(recomputed) == {"none": 0, "1": 1, "all": 2}[layers]
        results[layers] = gradients(job)
    assert torch.equal(results["none"], results["1"]) and torch.equal(results["none"], results["all"])


def test_every_adapter_tensor_has_a_gradient_with_recomputation(zoo: Zoo, tmp_path: Path) -> None:
    job = job_of(zoo("llama"), tmp_path, "memory.recompute=all")
    gradients(job)
    assert all(bool(gradient.any()) for gradient in job.optimizer.gradients)  # type: ignore[attr-defined]


# ---- loss and gradient against transformers and plain autograd


@contextmanager
def merged(model: Any, base: Any) -> Iterator[Any]:
    """transformers' model with the adapters of `base` merged into its matrices."""
    with torch.no_grad():
        for path, layer in adapted(base).items():
            model.get_submodule(path).weight.copy_(layer.merged_weight())
    yield model


@pytest.mark.sample(of=6, every=("family",))
@pytest.mark.parametrize("chunk_rows", [1, 7, 10**6])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_cross_entropy_of_transformers_logits(
    zoo: Zoo, family: str, chunk_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(zoo(family), tmp_path, "quant.kind=dense", records=4)
    monkeypatch.setattr("qlora.model.lm_head.Head.chunk_rows", lambda self: chunk_rows)
    batch = collate(job.train_examples, pad_id=0)
    loss = job.model(batch.input_ids, batch.labels, batch.position_ids, batch.layout)
    reference = AutoModelForCausalLM.from_pretrained(zoo(family), dtype=torch.float32)
    with merged(reference, job.model.model) as model, torch.no_grad():
        expected = torch.zeros(())
        for example in job.train_examples:  # one by one, without padding
            ids = torch.as_tensor(example.input_ids, dtype=torch.long)[None]
            labels = torch.as_tensor(example.labels, dtype=torch.long)[1:]
            expected += F.cross_entropy(model(input_ids=ids).logits[0, :-1], labels, reduction="sum", ignore_index=-100)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-5)
    assert batch.trained_tokens == sum(example.trained_tokens() for example in job.train_examples)


@pytest.mark.sample(of=6)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_is_that_of_plain_autograd(zoo: Zoo, family: str, tmp_path: Path) -> None:
    """The custom backward passes (low-rank branch, frozen product, head) against autograd through W + s B A."""
    job = job_of(zoo(family), tmp_path, records=3)
    actual = gradients(job, micro_batch=1)
    reference: Any = AutoModelForCausalLM.from_pretrained(zoo(family), dtype=torch.float32)
    loss: TokenLoss = job.model  # type: ignore[assignment]
    leaves = {name: value.detach().clone().requires_grad_() for name, value in job.trainable.items()}
    parameters = dict(reference.named_parameters())
    for path, layer in adapted(loss.model).items():
        update = layer.scaling * (leaves[f"{path}.B"] @ leaves[f"{path}.A"])
        parameters[f"{path}.weight"] = layer.base.weight(torch.float32) + update
    total, tokens = torch.zeros(()), 0
    for example in job.train_examples:
        ids = torch.as_tensor(example.input_ids, dtype=torch.long)[None]
        labels = torch.as_tensor(example.labels, dtype=torch.long)[1:]
        logits = torch.func.functional_call(reference, parameters, (), {"input_ids": ids}, tie_weights=True).logits
        total = total + F.cross_entropy(logits[0, :-1], labels, reduction="sum")
        tokens += int((labels != IGNORED).sum())
    (total / tokens).backward()
    expected = torch.cat([leaves[name].grad.flatten() for name in job.trainable])
    assert difference(actual, expected) <= 5e-6  # float32, another order of products


def test_an_example_without_labels_adds_nothing(job: Job) -> None:
    random.seed(0)
    untrained = replace(job.train_examples[0], labels=np.full_like(job.train_examples[0].labels, IGNORED))
    gradient = gradients(job, train=[*job.train_examples, untrained], global_batch=9, micro_batch=2)
    assert difference(gradient, gradients(job, micro_batch=2)) <= 1e-6
