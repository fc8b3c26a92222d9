"""A portable adapter equals the original in PEFT; the table of servers names what each can load."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from support.adapted_models import load_plain, logits
from support.command_line import qlora
from support.small_runs import recipe_of, run, write_records
from torch import Tensor

from qlora.adapters import peft_files

Zoo = Callable[..., Path]
FAMILY = "llama-tied-bias"
SETTINGS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 8, "layers.1.mlp.up_proj": 3},
        "alpha_pattern": {"k_proj": 5, "up_proj": 9},
    },
}
SETTINGS["rslora with patterns"] = SETTINGS["rslora"] | SETTINGS["patterns"]


def write_with_peft(zoo: Zoo, folder: Path, settings: dict[str, Any]) -> Path:
    """A random adapter with a large update, made and written by PEFT."""
    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(load_plain(zoo(FAMILY)), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    return folder


def peft_logits(zoo: Zoo, adapter: Path) -> Tensor:
    return logits(PeftModel.from_pretrained(load_plain(zoo(FAMILY)), adapter).eval())


@pytest.mark.sample(of=4)
@pytest.mark.parametrize("name", SETTINGS)
def test_it_equals_the_original_in_peft_without_scaling_or_patterns(zoo: Zoo, name: str, tmp_path: Path) -> None:
    source = write_with_peft(zoo, tmp_path / "source", SETTINGS[name])
    result = qlora("export", source, tmp_path / "portable", "--to", "portable", "--json")
    assert result.json["agreement"] is None and "vllm serve" in result.err
    config = json.loads((tmp_path / "portable" / peft_files.CONFIG).read_text())
    assert config["r"] == config["lora_alpha"] == (8 if "patterns" in name else 4)
    assert not config["use_rslora"] and config["rank_pattern"] == config["alpha_pattern"] == {}
    assert {tensor.shape[0] for tensor, _ in peft_files.read(tmp_path / "portable").pairs.values()} == {config["r"]}
    before, after = peft_logits(zoo, source), peft_logits(zoo, tmp_path / "portable")
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)  # float32: the scaling is multiplied earlier
    assert (logits(load_plain(zoo(FAMILY))) - before).abs().max() > 0.1  # the update is not negligible


def test_a_portable_export_of_a_run_keeps_base_and_targets(zoo: Zoo, tmp_path: Path) -> None:
    data = write_records(tmp_path / "records.jsonl", 8)
    run(recipe_of(zoo(FAMILY), data, tmp_path / "run", "adapter.kind=rslora", "train.max_steps=2"))
    answer = qlora("export", tmp_path / "run", tmp_path / "out", "--to", "portable", "--json").json
    source, written = (peft_files.read(tmp_path / name) for name in ("run", "out"))
    assert source.base_sha256 == written.base_sha256
    assert source.config["target_modules"] == written.config["target_modules"]
    assert answer["bytes"] == (tmp_path / "out" / peft_files.WEIGHTS).stat().st_size
    model_card = (tmp_path / "out" / "README.md").read_text()
    assert "2 optimizer steps" in model_card and "More Information Needed" not in model_card
    assert str(tmp_path) not in model_card and str(zoo(FAMILY)) not in model_card
    torch.testing.assert_close(
        peft_logits(zoo, tmp_path / "out"), peft_logits(zoo, tmp_path / "run"), rtol=0, atol=1e-4
    )
    loss, portable_loss = (
        qlora("eval", tmp_path / "run", *options, "--data", data, "--json").json["loss"]
        for options in ((), ("--adapter", tmp_path / "out"))
    )
    assert portable_loss == pytest.approx(loss, rel=1e-5)
