"""Padding and packing: padding is known by position, never by token id, and no document sees another."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, MistralConfig, Qwen3Config

from qlora.data.batching.collate import collate
from qlora.data.batching.join import join_documents
from qlora.data.batching.packing import best_fit_groups, pack, split_documents
from qlora.data.types import IGNORED, Example, trained_tokens


def make_example(length: int, first: int = 1, where: str = "x:1") -> Example:
    ids = np.arange(first, first + length, dtype=np.int32)
    labels = ids.copy()
    labels[: length // 2] = IGNORED
    return Example(where, ids, labels)


@pytest.mark.parametrize("pad_id", [0, 3, 7])  # also ids of the examples
def test_padding_is_by_position_whatever_its_id(pad_id: int) -> None:
    examples = [make_example(5), make_example(2), make_example(9)]
    together = collate(examples, pad_id)
    for row, example in enumerate(examples):
        alone, length = collate([example], pad_id), len(example)
        assert torch.equal(together.input_ids[row, :length], alone.input_ids[0])
        assert torch.equal(together.labels[row, :length], alone.labels[0])
        assert (together.input_ids[row, length:] == pad_id).all()
        assert (together.labels[row, length:] == IGNORED).all()
    assert together.position_ids.tolist() == [list(range(9))] * 3  # as without packing
    assert together.input_ids.dtype == together.labels.dtype == together.position_ids.dtype == torch.int64


def test_positions_restart_at_a_document_whose_first_token_is_no_target() -> None:
    packed = join_documents([make_example(3, 1, "x:1"), make_example(1, 11, "x:2"), make_example(4, 21, "x:3")])
    batch = collate([packed, make_example(10)], 0)
    assert batch.position_ids[0].tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 4, 5]
    assert batch.labels[0].tolist() == [IGNORED, 2, 3, IGNORED, IGNORED, IGNORED, 23, 24, IGNORED, IGNORED]
    assert packed.boundaries == (3, 4) and packed.origins == ("x:1", "x:2", "x:3")
    assert packed.trained_tokens() == int((batch.labels[0] != IGNORED).sum())


@settings(max_examples=200)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=80), max_length=st.integers(40, 64))
def test_packing_keeps_every_example_and_fills_sequences(lengths: list[int], max_length: int) -> None:
    groups = best_fit_groups(lengths, max_length)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in group) <= max_length for group in groups)
    fewest = -(-sum(lengths) // max_length)
    assert len(groups) <= 2 * fewest + 1  # two sequences that are both half empty would have been one
    assert groups == best_fit_groups(lengths, max_length)


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=30))
def test_splitting_packed_sequences_gives_the_examples_back(lengths: list[int]) -> None:
    examples = [make_example(length, 100 * i, f"x:{i}") for i, length in enumerate(lengths, 1)]
    packed = pack(examples, 32)
    documents = {document.where: document for sequence in packed for document in split_documents(sequence)}
    assert len(documents) == len(examples)
    for example in examples:
        assert np.array_equal(documents[example.where].input_ids, example.input_ids)
        assert np.array_equal(documents[example.where].labels, example.labels)
    assert trained_tokens(packed) == trained_tokens(examples)


def test_packing_instruction_data_is_close_to_full() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(4.6, 0.7, 5000).astype(int), 10, 2048).tolist()
    groups = best_fit_groups(lengths, 2048)
    assert sum(lengths) / (len(groups) * 2048) > 0.99


SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE, num_key_value_heads=2),
    "qwen3": Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=8),
    "gpt_neox": GPTNeoXConfig(**SHAPE),
    "sliding": MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=4),
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_packed_document_sees_no_other(family: str, attention: str) -> None:
    """Logits within 1e-5 of those of the document alone: float32, sums in another order."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family], attn_implementation=attention).eval()
    draw = np.random.default_rng(0)
    examples = [trained_example(draw.integers(1, 64, size), f"x:{i}") for i, size in enumerate((7, 3, 12, 1, 9), 1)]
    packed = [join_documents(examples[:3]), join_documents(examples[3:])]  # the shorter sequence is padded
    batch = collate(packed, 0)
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        for row, sequence in enumerate(packed):
            for start, document in zip(sequence.document_starts(), split_documents(sequence), strict=True):
                alone = collate([document], 0)
                expected = model(input_ids=alone.input_ids, position_ids=alone.position_ids, use_cache=False).logits
                actual = logits[row, start : start + len(document)]
                assert (actual - expected[0]).abs().max() < 1e-5
        leaky = model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=torch.ones_like(batch.labels)
        ).logits
    assert (leaky - logits).abs().max() > 1e-2  # an all-ones mask leaks, so the test above can fail


def trained_example(ids: np.ndarray, where: str) -> Example:
    return Example(where, ids.astype(np.int32), ids.astype(np.int32))


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=7), min_size=1, max_size=5))
def test_trained_positions_are_those_before_a_label(rows: list[list[bool]]) -> None:
    examples = []
    for row in rows:
        ids = np.arange(1, len(row) + 1, dtype=np.int32)
        examples.append(Example("x:1", ids, np.where(row, ids, IGNORED).astype(np.int32)))
    batch = collate(examples, 0)
    mask = batch.labels[:, 1:] != IGNORED
    expected = torch.nn.functional.pad(mask, (0, 1)).flatten().nonzero().squeeze(1)
    assert torch.equal(batch.trained, torch.stack([expected, expected + 1]))
    assert batch.trained_tokens == int(mask.sum())
    moved = batch.to(torch.device("meta"))
    assert moved.trained.device.type == "meta" and moved.trained_tokens == batch.trained_tokens
