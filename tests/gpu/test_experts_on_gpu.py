"""Mixtures of experts on the pretended GPU: nothing mixes devices, and streamed weights train the same adapter."""

from pathlib import Path

import pytest
from support.expert_families import save_family
from support.gpu_runs import SETTINGS, checked_gpu
from support.small_runs import differing_tensors, recipe_of, run, write_records

MEMORY = {
    "plain": ("memory.recompute=none",),
    "streamed": ("memory.recompute=all", "memory.weights=stream", "memory.offload_activations=true"),
}


@pytest.mark.sample(of=4)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_memory_settings_do_not_change_the_adapter(family: str, tmp_path: Path) -> None:
    model = save_family(tmp_path / "base", family, num_hidden_layers=1, layer_types=None)
    records = write_records(tmp_path / "records.jsonl", 12)
    for name, settings in MEMORY.items():
        with checked_gpu():
            run(recipe_of(model, records, tmp_path / name, *SETTINGS, *settings))
    assert differing_tensors(tmp_path / "plain", tmp_path / "streamed") == []
