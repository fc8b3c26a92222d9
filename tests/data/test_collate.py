"""Padding and packing: by place and never by token, and no document reads another."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, MistralConfig, Qwen3Config

from qlora.data.batching.collate import collate
from qlora.data.batching.packing import best_fit, join, pack, split
from qlora.data.types import IGNORED, Example


def example_of(length: int, first: int = 1, where: str = "x:1") -> Example:
    ids = np.arange(first, first + length, dtype=np.int32)
    labels = ids.copy()
    labels[: length // 2] = IGNORED
    return Example(where, ids, labels)


@pytest.mark.parametrize("pad_id", [0, 3, 7])  # among the ids of the rows as well
def test_padding_is_by_place_whatever_its_id(pad_id):
    rows = [example_of(5), example_of(2), example_of(9)]
    together = collate(rows, pad_id)
    for row, example in enumerate(rows):
        alone, length = collate([example], pad_id), len(example)
        assert torch.equal(together.input_ids[row, :length], alone.input_ids[0])
        assert torch.equal(together.labels[row, :length], alone.labels[0])
        assert (together.input_ids[row, length:] == pad_id).all()
        assert (together.labels[row, length:] == IGNORED).all()
    assert together.position_ids.tolist() == [list(range(9))] * 3  # nothing that reads as packed
    assert together.input_ids.dtype == together.labels.dtype == together.position_ids.dtype == torch.int64


def test_positions_restart_where_a_document_begins_and_its_first_token_is_no_target():
    packed = join([example_of(3, 1, "x:1"), example_of(1, 11, "x:2"), example_of(4, 21, "x:3")])
    batch = collate([packed, example_of(10)], 0)
    assert batch.position_ids[0].tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 4, 5]
    assert batch.labels[0].tolist() == [IGNORED, 2, 3, IGNORED, IGNORED, IGNORED, 23, 24, IGNORED, IGNORED]
    assert packed.boundaries == (3, 4) and packed.parts == ("x:1", "x:2", "x:3")
    assert packed.trained_tokens() == int((batch.labels[0] != IGNORED).sum())


@settings(max_examples=200)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=80), room=st.integers(40, 64))
def test_packing_keeps_every_row_and_fills_rows_well(lengths, room):
    groups = best_fit(lengths, room)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in group) <= room for group in groups)
    fewest = -(-sum(lengths) // room)
    assert len(groups) <= 2 * fewest + 1  # two rows that are both half empty would have been one
    assert groups == best_fit(lengths, room)


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=30))
def test_unpacking_a_packed_set_gives_the_rows_back(lengths):
    rows = [example_of(length, 100 * i, f"x:{i}") for i, length in enumerate(lengths, 1)]
    packed = pack(rows, 32)
    back = {part.where: part for row in packed for part in split(row)}
    assert len(back) == len(rows)
    for row in rows:
        assert np.array_equal(back[row.where].input_ids, row.input_ids)
        assert np.array_equal(back[row.where].labels, row.labels)
    assert sum(row.trained_tokens() for row in packed) == sum(row.trained_tokens() for row in rows)


def test_packing_is_close_to_full_on_an_instruction_sets_lengths():
    lengths = np.clip(np.random.default_rng(0).lognormal(4.6, 0.7, 5000).astype(int), 10, 2048).tolist()
    groups = best_fit(lengths, 2048)
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
def test_a_packed_document_reads_no_other(family, attention):
    """Logits within 1e-5 of those of the document alone: float32, sums in another order."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family], attn_implementation=attention).eval()
    draw = np.random.default_rng(0)
    rows = [example_of_ids(draw.integers(1, 64, size), f"x:{i}") for i, size in enumerate((7, 3, 12, 1, 9), 1)]
    packed = [join(rows[:3]), join(rows[3:])]  # two rows of a batch, the shorter one padded
    batch = collate(packed, 0)
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        for place, row in enumerate(packed):
            for start, document in zip(row.starts(), split(row), strict=True):
                alone = collate([document], 0)
                expected = model(input_ids=alone.input_ids, position_ids=alone.position_ids, use_cache=False).logits
                found = logits[place, start : start + len(document)]
                assert (found - expected[0]).abs().max() < 1e-5
        leaky = model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=torch.ones_like(batch.labels)
        ).logits
    assert (leaky - logits).abs().max() > 1e-2  # the all-ones mask does leak, so the law above has teeth


def example_of_ids(ids, where: str) -> Example:
    return Example(where, ids.astype(np.int32), ids.astype(np.int32))
