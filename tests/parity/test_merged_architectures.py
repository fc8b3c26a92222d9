"""The merged model of an unusual class gives transformers the logits of the trained one, buffers and head included."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.architectures import save_architecture
from support.small_runs import recipe_of, run, write_records
from transformers import AutoModelForCausalLM

from qlora.exporters import ExportRequest
from qlora.exporters.export_run import export_run
from qlora.model.lm_head import Head
from qlora.runs.load_run import load_run

IDS = torch.randint(40, 200, (2, 24), generator=torch.Generator().manual_seed(1))
POSITIONS = torch.arange(24).expand(2, -1)


@pytest.mark.sample(of=4)
@pytest.mark.parametrize("kind", ["falcon_h1", "qwen3_5_text", "granitemoehybrid", "apertus", "dory", "gpt_bigcode"])
@torch.no_grad()
def test_a_merged_model_reloads(kind: str, tmp_path: Path) -> None:
    folder = save_architecture(tmp_path / "base", kind, 10**6)
    data = write_records(tmp_path / "rows.jsonl", 4)
    with torch.enable_grad():
        run(recipe_of(folder, data, tmp_path / "run", "train.max_steps=2", quant={"kind": "dense"}))
    trained = load_run(str(tmp_path / "run"))
    export_run(trained, ExportRequest(to="merged", dtype="float32"), str(tmp_path / "merged"))
    head: Any = Head(trained.base.model)
    logits = head(head.hidden_states(IDS, POSITIONS))
    merged, base = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval() for name in ("merged", "base")
    )
    expected, before = (model(input_ids=IDS, use_cache=False).logits for model in (merged, base))
    assert torch.allclose(logits, expected, atol=1e-3 * float(expected.std()))
    assert float((expected - before).abs().max()) > 0.1 * float(before.std())
