"""The per-layer embedding of Gemma 3n and 4 in host memory: the same logits, no parameter of the model, no move."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapted_models import load_base, logits
from support.architectures import save_architecture

from qlora.model.host_table import TABLE, HostTable, keep_table_on_host
from qlora.training.base_check import compare_base

# Two of the four layers have no keys and values of their own; soft caps; a wider head in the layers of full attention.
SHARED = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 16,
          "layer_types": ["sliding_attention", "full_attention"] * 2, "final_logit_softcapping": 30.0}  # fmt: skip


@pytest.mark.parametrize("kind, options", [("gemma4_text", {"global_head_dim": 32}), ("gemma3n_text", {})])
def test_rows_come_from_host_memory(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = load_base(save_architecture(tmp_path, kind, 10**6, SHARED | options), "nf4").model
    expected = logits(model)
    assert keep_table_on_host(model) and not keep_table_on_host(model)
    assert torch.equal(logits(model), expected)
    assert isinstance(model.get_submodule(f"model.{TABLE}"), HostTable)
    assert not any(TABLE in name for name, _ in [*model.named_parameters(), *model.named_buffers()])
    agreement = compare_base(model)
    assert agreement.largest_difference < 1e-5
    assert all("layers.2" in note and "k_proj" in note for note in agreement.notes if "not adapted" in note)


def test_another_model_has_no_such_table(tmp_path: Path) -> None:
    assert not keep_table_on_host(load_base(save_architecture(tmp_path, "llama", 10**6), "dense").model)
