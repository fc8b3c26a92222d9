"""A head that the files store apart from the embedding, although config.json ties the two, is the base's head."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from support.architectures import edit_config
from support.small_runs import metrics, recipe_of, run, write_records
from support.tiny_models import save_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora.exporters import ExportRequest
from qlora.exporters.export_run import export_run
from qlora.model import Model
from qlora.model.lm_head import Head
from qlora.model.load_base import load
from qlora.model.tied_head import stores_own_head
from qlora.quant.dense import Dense
from qlora.runs.load_run import load_run

IDS = torch.randint(40, 200, (2, 24), generator=torch.Generator().manual_seed(1))


def with_head(folder: Path, head: Callable[[Tensor], Tensor]) -> Path:
    """A tied model with a head in its file too."""
    save_model(folder, "llama-tied-bias")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": head(tensors["model.embed_tokens.weight"])}, file, {"format": "pt"})
    return folder


@torch.no_grad()
def logits_of(folder: Path) -> Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(input_ids=IDS).logits  # type: ignore[no-any-return]


@torch.no_grad()
def own_logits(folder: Path) -> tuple[Tensor, tuple[str, ...]]:
    base = load(Model(name=str(folder), dtype="float32"), Dense(), torch.device("cpu"))
    head: Any = Head(base.model)
    return head(head.hidden_states(IDS, torch.arange(24).expand(2, -1))), base.notes


def test_another_head_is_used_and_named(tmp_path: Path) -> None:
    folder = with_head(tmp_path / "other", lambda embedding: embedding.flip(0) * 1.5)
    logits, notes = own_logits(folder)
    assert torch.allclose(logits, logits_of(folder), atol=1e-4)
    assert any("the files hold another head" in note for note in notes)


def test_a_copy_of_the_embedding_stays_tied(tmp_path: Path) -> None:
    folder = with_head(tmp_path / "copy", torch.clone)
    assert not stores_own_head(folder)
    logits, notes = own_logits(folder)
    assert torch.allclose(logits, logits_of(folder), atol=1e-4) and notes == ()


def test_an_untied_base_needs_no_note(tmp_path: Path) -> None:
    folder = with_head(tmp_path / "untied", lambda embedding: embedding.flip(0))
    edit_config(folder, tie_word_embeddings=False)
    logits, notes = own_logits(folder)
    assert torch.allclose(logits, logits_of(folder), atol=1e-4) and notes == ()


def test_the_merged_model_has_the_head_of_the_files(tmp_path: Path) -> None:
    """The report's case: the head was tied, the merge left it out, and the certificate passed."""
    folder = with_head(tmp_path / "base", lambda embedding: embedding.flip(0) * 1.5)
    options = ("data.eval_fraction=0.5", "train.max_steps=2")
    data = write_records(tmp_path / "rows.jsonl", 8)
    run(recipe_of(folder, data, tmp_path / "run", *options, quant={"kind": "dense"}))
    assert metrics(tmp_path / "run", "eval")
    trained = load_run(str(tmp_path / "run"))
    export_run(trained, ExportRequest(to="merged", dtype="float32"), str(tmp_path / "merged"))
    head: Any = Head(trained.base.model)
    with torch.no_grad():
        logits = head(head.hidden_states(IDS, torch.arange(24).expand(2, -1)))
    assert torch.allclose(logits, logits_of(tmp_path / "merged"), atol=1e-3)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(merged["lm_head.weight"], load_file(folder / "model.safetensors")["lm_head.weight"])
