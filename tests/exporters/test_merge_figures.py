"""A merge of a model trained on GSM8K has the reported figures; adapters fit their own base, and only that."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapted_models import build_adapter, load_base, load_plain, logits
from support.paths import SHARED
from support.small_runs import recipe_of, run, write_records
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from qlora.adapters import peft_files
from qlora.adapters.attach import attach
from qlora.adapters.inject import adapted, inject
from qlora.data.types import IGNORED
from qlora.errors import AdapterError
from qlora.exporters import ExportRequest
from qlora.exporters.export_run import export_run
from qlora.runs.load_run import held_out_examples, load_run

Zoo = Callable[..., Path]
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here: no pretrained model")


@pytest.fixture(scope="module")
def gsm8k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K after 60 steps on GSM8K."""
    folder = tmp_path_factory.mktemp("gsm8k")
    records = [json.loads(line) for line in (SHARED / "gsm8k" / "train.jsonl").read_text().splitlines()]
    short = sorted(records, key=lambda record: len(record["question"] + record["answer"]))[:300]
    data = folder / "records.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": record["question"], "completion": record["answer"]}) + "\n" for record in short)
    )
    options = ("train.max_steps=60", "train.global_batch=8", "data.max_length=400", "data.eval_fraction=0.1")
    recipe = recipe_of(SHARED / "stories260K", data, folder / "run", *options, adapter={"rank": 8, "alpha": 16})
    manifest = run(recipe)
    assert manifest["result"]["eval_loss"] < manifest["result"]["eval_loss_before"] - 0.3  # it has learned
    return folder / "run"


def measure(trained: Any, written: Any, examples: Any) -> dict[str, float]:
    """An independent measurement, example by example in float64."""
    kl = same = tokens = targets = 0.0
    losses = [0.0, 0.0]
    for example in examples:
        ids = torch.as_tensor(example.input_ids, dtype=torch.long)[None]
        p, q = (F.log_softmax(logits(model, ids)[0].double(), -1) for model in (trained, written))
        kl, tokens = kl + float((p.exp() * (p - q)).sum()), tokens + ids.numel()
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        labels = torch.as_tensor(example.labels, dtype=torch.long)[1:]
        is_target = labels != IGNORED
        for number, logs in enumerate((p, q)):
            losses[number] -= float(logs[:-1][is_target].gather(1, labels[is_target, None]).sum())
        targets += int(is_target.sum())
    return {
        "mean_kl": kl / tokens, "top1": same / tokens,
        "trained_loss": losses[0] / targets, "written_loss": losses[1] / targets,
    }  # fmt: skip


@pytest.mark.slow
@needs_shared
@pytest.mark.parametrize(("dtype", "top1", "loss"), [("float32", 1.0, 1e-4), ("bfloat16", 0.97, math.inf)])
def test_a_merge_agrees_with_the_trained_model_as_reported(
    gsm8k: Path, dtype: str, top1: float, loss: float, tmp_path: Path
) -> None:
    loaded = load_run(str(gsm8k))
    reported = export_run(loaded, ExportRequest("merged", dtype=dtype), str(tmp_path / "merged"))["agreement"]
    written = load_plain(tmp_path / "merged", getattr(torch, dtype))
    measured = measure(loaded.base.model, written, held_out_examples(loaded, None))
    assert reported["top1"] >= top1 and measured["top1"] >= top1
    assert abs(reported["written_loss"] - reported["trained_loss"]) <= loss
    for name, value in measured.items():
        # 10 %; sums close to zero differ with their order
        assert reported[name] == pytest.approx(value, rel=0.1, abs=1e-7), name


def test_an_adapter_of_a_base_with_more_layers_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    """With a fingerprint because of it, whatever the base is called; without one, as PEFT writes it, by its layers."""
    folder = zoo("llama")
    base, adapter = load_base(folder), build_adapter(rank=2)
    inject(base.model, adapter, "all-linear", 0)
    for number, sha256 in enumerate((base.manifest.sha256, "")):
        identity = peft_files.BaseIdentity("any", None, sha256)
        peft_files.write(tmp_path / str(number), base.model, adapter, identity)
    weights = tmp_path / "1" / peft_files.WEIGHTS
    weights.write_bytes(peft_files.serialize(peft_files.read_tensors(weights)))
    short = tmp_path / "short"
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    model.save_pretrained(short)
    for file in folder.glob("token*"):
        (short / file.name).write_bytes(file.read_bytes())
    other = load_base(short)
    reasons = ("was trained on other weights", r"layers\.1\.\S+ is not a linear layer of this base")
    for number, reason in enumerate(reasons):
        with pytest.raises(AdapterError, match=reason):
            attach(other.model, peft_files.read(tmp_path / str(number)), other.manifest.sha256)
        assert not adapted(other.model)


def test_an_adapter_is_accepted_by_every_copy_of_its_base(zoo: Zoo, tmp_path: Path) -> None:
    """In another folder, with other shards, in another dtype with the same values."""
    data, base = write_records(tmp_path / "records.jsonl", 8), zoo("llama", dtype=torch.bfloat16)
    run(recipe_of(base, data, tmp_path / "run", "train.max_steps=1"))
    model = AutoModelForCausalLM.from_pretrained(base)
    for name, dtype, size in (("a", torch.bfloat16, "20KB"), ("b", torch.float32, "1GB")):
        copy = tmp_path / name
        model.to(dtype).save_pretrained(copy, max_shard_size=size)
        for file in base.glob("token*"):
            (copy / file.name).write_bytes(file.read_bytes())
        run_copy = tmp_path / f"run-{name}"
        run_copy.mkdir()
        for file in (peft_files.WEIGHTS, peft_files.CONFIG, "run.json"):
            (run_copy / file).write_bytes((tmp_path / "run" / file).read_bytes())
        recipe = (tmp_path / "run" / "recipe.yaml").read_text()
        (run_copy / "recipe.yaml").write_text(recipe.replace(str(base), str(copy)))
        assert len(adapted(load_run(str(run_copy)).base.model)) == 14
