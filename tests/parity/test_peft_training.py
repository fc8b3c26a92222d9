"""PEFT with bitsandbytes as reference: the same frozen base, the same loss curve, the same 4-bit checkpoints."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.adapted_models import load_base, load_plain, logits
from support.paths import SHARED
from support.small_runs import recipe_of, write_records
from support.tiny_models import byte_tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from qlora.adapters.inject import adapted
from qlora.data.batching.collate import collate
from qlora.data.batching.sampler import Sampler
from qlora.data.types import IGNORED
from qlora.errors import InputError
from qlora.exporters import ExportRequest
from qlora.exporters.export_run import export_run
from qlora.model.linear_layers import frozen_linears
from qlora.runs.load_run import load_run
from qlora.runs.resources import unplanned
from qlora.runs.setup import build_job, set_up
from qlora.runs.train import train
from qlora.training.checkpoint import Position
from qlora.training.job import Job
from qlora.training.loop import fit
from qlora.training.run_log import Log, read_metrics
from qlora.training.signals import StopSignal

peft = pytest.importorskip("peft")
bitsandbytes = pytest.importorskip("bitsandbytes")

pytestmark = pytest.mark.xdist_group("peft")
STEPS = 20


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with widths that are multiples of 64: bitsandbytes 0.50.2 dequantizes others wrongly on AVX512 CPUs."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def load_4bit(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' 4-bit model, in training mode: in evaluation mode Linear4bit repacks its weights on a CPU."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
    )  # fmt: skip
    options = {"quantization_config": config, "dtype": dtype, "device_map": "cpu"}
    return AutoModelForCausalLM.from_pretrained(folder, **options).train()


def job_of(model: Path, data: Path, folder: Path, *overrides: str) -> Job:
    options = (f"train.max_steps={STEPS}", "train.global_batch=4", "train.micro_batch=4", "optim.warmup=0", *overrides)
    recipe = recipe_of(model, data, folder / "run", *options)
    log = Log(folder / "run", quiet=True)
    log.truncate(0)
    return build_job(set_up(recipe, unplanned(recipe), log), log, StopSignal())


def train_with_peft(model: Any, job: Job, rank: int, alpha: int) -> list[float]:
    """PEFT's LoRA from our A and B, on our examples, under torch's AdamW: the mean loss of every step."""
    our_model: Any = job.model.model  # type: ignore[union-attr]
    leaves = sorted({path.rpartition(".")[2] for path in adapted(our_model)})
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=leaves, task_type="CAUSAL_LM")
    peft_model = peft.get_peft_model(model, config)
    for path, layer in adapted(our_model).items():
        module = peft_model.base_model.model.get_submodule(path)
        with torch.no_grad():
            module.lora_A["default"].weight.copy_(layer.A)
            module.lora_B["default"].weight.copy_(layer.B)
    trainable = [p for p in peft_model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trainable) == sum(p.numel() for p in job.trainable.values())
    optim = job.optim
    optimizer = torch.optim.AdamW(
        trainable, lr=optim.learning_rate, betas=optim.betas, weight_decay=optim.weight_decay, foreach=False
    )
    return [_peft_step(peft_model, job, step, trainable, optimizer) for step in range(STEPS)]


def _peft_step(model: Any, job: Job, step: int, trainable: Sequence[Tensor], optimizer: Any) -> float:
    indices = Sampler(job.data_order, job.settings.global_batch, job.settings.seed).indices(job.train_examples, step)
    batch = collate([job.train_examples[index] for index in indices], pad_id=0)
    out = model(input_ids=batch.input_ids, position_ids=batch.position_ids).logits[:, :-1].float()
    loss = F.cross_entropy(out.flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORED)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trainable, job.optim.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def losses_of(job: Job, folder: Path) -> list[float]:
    fit(job, Position())
    return [line["loss"] for line in read_metrics(folder / "run") if line["event"] == "train"]


def assert_same_curve(losses: list[float], peft_losses: list[float]) -> None:
    assert len(losses) == len(peft_losses) == STEPS
    assert max(abs(a - b) / b for a, b in zip(losses, peft_losses, strict=True)) <= 1e-3
    assert losses[-1] < 0.98 * losses[0]  # it has learned


def test_the_frozen_base_is_that_of_transformers_and_bitsandbytes(wide: Path) -> None:
    model, model_4bit = load_base(wide, "nf4").model, load_4bit(wide)
    compared = 0
    for path, module in model_4bit.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert torch.equal(model.get_submodule(path).weight(torch.float32), weight.float())
            compared += 1
    assert compared == 14
    torch.testing.assert_close(logits(model), logits(model_4bit), rtol=0, atol=1e-4)


def test_a_random_model_has_pefts_loss_curve(wide: Path, tmp_path: Path) -> None:
    job = job_of(wide, write_records(tmp_path / "records.jsonl", 24), tmp_path)
    peft_losses = train_with_peft(load_4bit(wide), job, rank=4, alpha=8)
    assert_same_curve(losses_of(job, tmp_path), peft_losses)


@pytest.mark.slow
def test_in_bfloat16_the_curve_is_nearer_to_pefts_than_another_seed(wide: Path, tmp_path: Path) -> None:
    """Another order of roundings changes the curve less than another random A, at every step after the first ten."""
    small = ("train.global_batch=2", "train.micro_batch=2")  # products in bfloat16 are slow on a CPU
    job = job_of(wide, write_records(tmp_path / "records.jsonl", 24), tmp_path, *small, "model.dtype=bfloat16")
    layers = list(adapted(job.model.model).values())  # type: ignore[arg-type]
    initial = [layer.A.detach().clone() for layer in layers]

    def peft_losses(seed: int | None) -> np.ndarray[Any, Any]:
        generator = torch.Generator().manual_seed(seed or 0)
        for layer, a in zip(layers, initial, strict=True):
            layer.reset(generator)
            if seed is None:
                layer.A.data.copy_(a)
        return np.array(train_with_peft(load_4bit(wide, torch.bfloat16), job, rank=4, alpha=8))

    other_seeds = [peft_losses(seed) for seed in (1, 2, 3)]
    same_start = peft_losses(None)
    losses = np.array(losses_of(job, tmp_path))
    spread = np.ptp([same_start, *other_seeds], axis=0)
    assert (np.abs(losses - same_start)[10:] < spread[10:]).all()
    assert np.abs(losses - same_start).max() / same_start[0] < 0.02


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here: no pretrained model, no GSM8K")
def test_a_pretrained_model_has_pefts_loss_curve_on_gsm8k(tmp_path: Path) -> None:
    model, lines = SHARED / "stories260K", (SHARED / "gsm8k" / "train.jsonl").read_text().splitlines()
    data = tmp_path / "gsm8k.jsonl"
    records = [json.loads(line) for line in sorted(lines, key=len)[:32]]
    data.write_text(
        "".join(json.dumps({"prompt": record["question"], "completion": record["answer"]}) + "\n" for record in records)
    )
    small = ("train.global_batch=2", "train.micro_batch=2")
    job = job_of(model, data, tmp_path, "data.max_length=400", "adapter.rank=8", "adapter.alpha=16", *small)
    assert len(job.train_examples) >= 30
    peft_losses = train_with_peft(load_4bit(model), job, rank=8, alpha=16)
    assert_same_curve(losses_of(job, tmp_path), peft_losses)


def test_a_4_bit_checkpoint_of_transformers_is_trained_and_merged(wide: Path, tmp_path: Path) -> None:
    stored = tmp_path / "stored"
    load_4bit(wide).save_pretrained(stored)
    byte_tokenizer().save_pretrained(stored)
    from_4bit, from_16bit = load_base(stored, "nf4"), load_base(wide, "nf4")
    layers_4bit, layers_16bit = frozen_linears(from_4bit.model), frozen_linears(from_16bit.model)
    assert list(layers_4bit) == list(layers_16bit)
    for path, layer in layers_4bit.items():
        assert torch.equal(layer.weight(torch.float32), layers_16bit[path].weight(torch.float32)), path
    assert torch.equal(logits(from_4bit.model), logits(from_16bit.model))
    data = write_records(tmp_path / "records.jsonl", 12)
    train(recipe_of(stored, data, tmp_path / "run", "train.max_steps=2"), quiet=True)
    loaded, request = load_run(str(tmp_path / "run")), ExportRequest("merged", dtype="float32", rows=2)
    agreement = export_run(loaded, request, str(tmp_path / "merged"))["agreement"]
    assert agreement["top1"] == 1.0 and agreement["max_logit_difference"] <= 1e-4
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    merged = load_plain(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(loaded.base.model), rtol=0, atol=1e-4)
    with pytest.raises(InputError, match="original"):
        export_run(loaded, replace(request, base="original"), str(tmp_path / "original"))
    assert not (tmp_path / "original").exists()
