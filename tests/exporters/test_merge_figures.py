"""What issue and README promise of a merge, on a pretrained model trained on GSM8K: figures, and what says them."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.paths import SHARED
from support.small_runs import recipe_of, run, write_rows
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from qlora.adapters import peft_files
from qlora.adapters.inject import adapted, inject
from qlora.adapters.lora import Lora
from qlora.data.types import IGNORED
from qlora.errors import AdapterError
from qlora.exporters.export_run import ExportRequest, export_run
from qlora.model import Model
from qlora.model.load_base import load
from qlora.quant import QUANTIZERS
from qlora.runs.load_run import held_out, load_run

Zoo = Callable[..., Path]
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here: no pretrained model")
pytestmark = pytest.mark.xdist_group("promises")


@pytest.fixture(scope="module")
def gsm8k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K after 60 steps on GSM8K."""
    folder = tmp_path_factory.mktemp("gsm8k")
    rows = [json.loads(line) for line in (SHARED / "gsm8k" / "train.jsonl").read_text().splitlines()]
    short = sorted(rows, key=lambda row: len(row["question"] + row["answer"]))[:300]
    data = folder / "rows.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": row["question"], "completion": row["answer"]}) + "\n" for row in short)
    )
    options = ("train.max_steps=60", "train.global_batch=8", "data.max_length=400", "data.eval_fraction=0.1")
    recipe = recipe_of(SHARED / "stories260K", data, folder / "run", *options, adapter={"rank": 8, "alpha": 16})
    manifest = run(recipe)
    assert manifest["result"]["eval_loss"] < manifest["result"]["eval_loss_before"] - 0.3  # it did learn
    return folder / "run"


def measured(ours: Any, theirs: Any, rows: Any) -> dict[str, float]:
    """An independent measurement, row by row in float64."""
    kl = same = tokens = trained = 0.0
    losses = [0.0, 0.0]
    for row in rows:
        ids = torch.as_tensor(row.input_ids, dtype=torch.long)[None]
        with torch.no_grad():
            found: list[Tensor] = [model(input_ids=ids).logits[0].double() for model in (ours, theirs)]
        p, q = (F.log_softmax(each, -1) for each in found)
        kl, tokens = kl + float((p.exp() * (p - q)).sum()), tokens + ids.numel()
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        labels = torch.as_tensor(row.labels, dtype=torch.long)[1:]
        at = labels != IGNORED
        losses = [
            sum_ - float(each[:-1][at].gather(1, labels[at, None]).sum())
            for sum_, each in zip(losses, (p, q), strict=True)
        ]
        trained += int(at.sum())
    return {
        "mean_kl": kl / tokens,
        "top1": same / tokens,
        "trained_loss": losses[0] / trained,
        "written_loss": losses[1] / trained,
    }


@pytest.mark.slow
@needs_shared
@pytest.mark.parametrize(("dtype", "top1", "loss"), [("float32", 1.0, 1e-4), ("bfloat16", 0.97, math.inf)])
def test_a_merge_answers_as_the_trained_model_and_the_figures_are_true(
    gsm8k: Path, dtype: str, top1: float, loss: float, tmp_path: Path
) -> None:
    opened = load_run(str(gsm8k))
    said = export_run(opened, ExportRequest("merged", "dequantized", dtype, None, None), str(tmp_path / "merged"))[
        "agreement"
    ]
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=getattr(torch, dtype)).eval()
    found = measured(opened.base.model, written, held_out(opened, None))
    assert said["top1"] >= top1 and found["top1"] >= top1
    assert abs(said["written_loss"] - said["trained_loss"]) <= loss
    for name, value in found.items():
        # 10 %; sums of nearly nothing differ with their order
        assert said[name] == pytest.approx(value, rel=0.1, abs=1e-7), name


def test_an_adapter_of_a_base_with_more_layers_is_refused_with_the_reason(zoo: Zoo, tmp_path: Path) -> None:
    """Also where the file carries no fingerprint, as PEFT writes it; and with one, whatever the base is called."""
    folder = zoo("llama")
    base = load(Model(name=str(folder), dtype="float32"), QUANTIZERS["nf4"](), torch.device("cpu"))
    adapter = Lora(2, 4.0)
    inject(base.model, adapter, "all-linear", 0)
    for number, sha256 in enumerate((base.manifest.sha256, "")):
        peft_files.write(tmp_path / str(number), base.model, adapter, peft_files.Identity("any", None, sha256))
    (tmp_path / "1" / peft_files.WEIGHTS).write_bytes(
        peft_files.serialize(peft_files.read_named(tmp_path / "1" / peft_files.WEIGHTS))
    )
    short = tmp_path / "short"
    fewer = AutoModelForCausalLM.from_pretrained(folder)
    fewer.model.layers = fewer.model.layers[:1]
    fewer.config.num_hidden_layers = 1
    fewer.save_pretrained(short)
    for file in folder.glob("token*"):
        (short / file.name).write_bytes(file.read_bytes())
    other = load(Model(name=str(short), dtype="float32"), QUANTIZERS["nf4"](), torch.device("cpu"))
    for number, reason in enumerate(("was trained on other weights", r"layers\.1\.\S+ is no linear layer here")):
        with pytest.raises(AdapterError, match=reason):
            peft_files.attach(other.model, peft_files.read(tmp_path / str(number)), other.manifest.sha256)
        assert not adapted(other.model)


def test_an_adapter_trained_here_is_never_refused_on_its_own_base(zoo: Zoo, tmp_path: Path) -> None:
    """Its base moved, in other shards, in another dtype that holds the same values."""
    data = write_rows(tmp_path / "rows.jsonl", 8)
    run(recipe_of(zoo("llama", dtype=torch.bfloat16), data, tmp_path / "run", "train.max_steps=1"))
    model = AutoModelForCausalLM.from_pretrained(zoo("llama", dtype=torch.bfloat16))
    for name, dtype, size in (("a", torch.bfloat16, "20KB"), ("b", torch.float32, "1GB")):
        moved = tmp_path / name
        model.to(dtype).save_pretrained(moved, max_shard_size=size)
        for file in zoo("llama", dtype=torch.bfloat16).glob("token*"):
            (moved / file.name).write_bytes(file.read_bytes())
        recipe = (tmp_path / "run" / "recipe.yaml").read_text()
        again = tmp_path / f"run-{name}"
        again.mkdir()
        for file in (peft_files.WEIGHTS, peft_files.CONFIG, "run.json"):
            (again / file).write_bytes((tmp_path / "run" / file).read_bytes())
        (again / "recipe.yaml").write_text(recipe.replace(str(zoo("llama", dtype=torch.bfloat16)), str(moved)))
        assert len(adapted(load_run(str(again)).base.model)) == 14
