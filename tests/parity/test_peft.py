"""PEFT as the oracle: it reads our adapters and we read its, and training on a bitsandbytes base goes the same way."""

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.paths import SHARED
from support.small_runs import recipe_of, write_rows
from support.tiny_models import byte_tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from qlora.adapters import ADAPTERS, peft_files
from qlora.adapters.dora import DoraLinear
from qlora.adapters.inject import adapted, inject
from qlora.data.batching.collate import collate
from qlora.data.batching.sampler import Sampler
from qlora.data.types import IGNORED
from qlora.errors import InputError
from qlora.exporters.export_run import ExportRequest, export_run
from qlora.model import Model
from qlora.model.load_base import Base, load
from qlora.quant import QUANTIZERS
from qlora.quant.linear import FrozenLinear
from qlora.runs.load_run import load_run
from qlora.runs.strategy import open_processes
from qlora.runs.train import assemble, gather
from qlora.runs.train import train as walk
from qlora.training.checkpoint import Position
from qlora.training.loop import Job, fit
from qlora.training.run_log import Log, read_metrics
from qlora.training.signals import StopSignal

peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

Zoo = Callable[..., Path]
CPU = torch.device("cpu")
IDS = torch.randint(5, 250, (2, 30), generator=torch.Generator().manual_seed(0))
STEPS = 30


def base_of(folder: Path, quantizer: str = "dense") -> Base:
    return load(Model(name=str(folder), dtype="float32"), QUANTIZERS[quantizer](), CPU)


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


# ---- files, both ways


@pytest.mark.parametrize("targets", ["all-linear", r".*\.1\..*"], ids=["all", "one layer"])
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("family", ["llama-tied-bias", "gemma2", "qwen3", "phi3", "gpt_neox"])
def test_peft_reads_our_folder_without_a_word(zoo: Zoo, family: str, kind: str, targets: str, tmp_path: Path) -> None:
    base = base_of(zoo(family))
    adapter = ADAPTERS[kind](rank=3, alpha=5.0, dropout=0.1)
    inject(base.model, adapter, targets, 0)
    for number, layer in enumerate(adapted(base.model).values()):
        torch.nn.init.normal_(layer.B, std=0.1, generator=torch.Generator().manual_seed(number))
        if isinstance(layer, DoraLinear):
            layer.magnitude.data *= torch.linspace(0.5, 1.5, len(layer.magnitude))
    peft_files.write(tmp_path, base.model, adapter, peft_files.Identity(str(zoo(family)), None, base.manifest.sha256))
    before = logits(plain(zoo(family)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for about_each_other in (DeprecationWarning, FutureWarning):  # PEFT's words on transformers, not on our folder
            warnings.simplefilter("ignore", about_each_other)
        read = peft.PeftModel.from_pretrained(plain(zoo(family)), tmp_path).eval()
    ours = logits(base.model.eval())
    torch.testing.assert_close(logits(read), ours, rtol=0, atol=1e-4)  # float32: another order of products
    assert (before - ours).abs().max() > 0.1


PATTERNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "DoRA": {"use_dora": True},
    "DoRA and rsLoRA by leaf": {"use_dora": True, "use_rslora": True, "rank_pattern": {"v_proj": 9}},
    "rsLoRA": {"use_rslora": True},
    "by leaf": {"rank_pattern": {"q_proj": 2, "down_proj": 8}, "alpha_pattern": {"q_proj": 32, "up_proj": 3}},
    "by path": {"rank_pattern": {"model.layers.0.mlp.up_proj": 7}, "alpha_pattern": {"layers.1.mlp.up_proj": 1}},
    "rsLoRA by leaf": {"use_rslora": True, "rank_pattern": {"v_proj": 9}, "alpha_pattern": {"v_proj": 2}},
    "first of two wins": {"alpha_pattern": {"mlp.up_proj": 1, "up_proj": 64}},
    "by regular expression": {
        "rank_pattern": {r"layers\.\d+\.self_attn\..*": 2},
        "alpha_pattern": {r".*\.mlp\..*": 24},
    },
}


@pytest.mark.parametrize("case", PATTERNS)
def test_we_read_pefts_folder(zoo: Zoo, case: str, tmp_path: Path) -> None:
    leaves = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=leaves, init_lora_weights=False, task_type="CAUSAL_LM", **PATTERNS[case]
    )
    torch.manual_seed(0)
    theirs = peft.get_peft_model(plain(zoo("llama")), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.mul_(2.0)
    theirs.save_pretrained(tmp_path)
    base = base_of(zoo("llama"))
    before = logits(base.model)
    note = peft_files.attach(base.model, peft_files.read(tmp_path), base.manifest.sha256)
    assert note is not None and "can't be checked" in note
    torch.testing.assert_close(logits(base.model), logits(theirs), rtol=0, atol=1e-4)
    assert (before - logits(base.model)).abs().max() > 0.1


def test_pefts_default_alpha_is_taken_where_its_config_is_silent(zoo: Zoo, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    theirs = peft.get_peft_model(plain(zoo("llama")), config).eval()
    theirs.save_pretrained(tmp_path)
    path = tmp_path / peft_files.CONFIG
    silent = {key: value for key, value in json.loads(path.read_text()).items() if key != "lora_alpha"}
    path.write_text(json.dumps(silent))
    again = peft.PeftModel.from_pretrained(plain(zoo("llama")), tmp_path).eval()
    base = base_of(zoo("llama"))
    peft_files.attach(base.model, peft_files.read(tmp_path), base.manifest.sha256)
    torch.testing.assert_close(logits(base.model), logits(again), rtol=0, atol=1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_dora_gives_pefts_output_and_gradients_dropout_included(zoo: Zoo, training: bool, tmp_path: Path) -> None:
    base = base_of(zoo("llama"))
    adapter = ADAPTERS["dora"](rank=3, alpha=5.0, dropout=0.4)
    inject(base.model, adapter, "all-linear", 0)
    for number, layer in enumerate(adapted(base.model).values()):
        assert isinstance(layer, DoraLinear)
        torch.nn.init.normal_(layer.B, std=0.1, generator=torch.Generator().manual_seed(number))
        layer.magnitude.data *= torch.linspace(0.5, 1.5, len(layer.magnitude))
    peft_files.write(tmp_path, base.model, adapter, peft_files.Identity("", None, base.manifest.sha256))
    theirs = peft.PeftModel.from_pretrained(plain(zoo("llama")), tmp_path, is_trainable=True)
    found = []
    for model in (base.model, theirs):
        torch.manual_seed(3)  # both draw one mask a layer, in the order of the layers
        out = model.train(training)(input_ids=IDS).logits
        F.cross_entropy(out[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
        found.append(out.detach())
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-4)
    grads = {
        name.removeprefix(peft_files.PREFIX).replace(".default", "").removesuffix(".weight"): parameter.grad
        for name, parameter in theirs.named_parameters() if parameter.requires_grad
    }  # fmt: skip
    for path, layer in adapted(base.model).items():
        assert isinstance(layer, DoraLinear)
        for name, ours in (("lora_A", layer.A), ("lora_B", layer.B), ("lora_magnitude_vector", layer.magnitude)):
            torch.testing.assert_close(ours.grad, grads[f"{path}.{name}"], rtol=1e-4, atol=1e-6)


# ---- training on a bitsandbytes base


def nf4(dtype: torch.dtype = torch.float32) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
    )  # fmt: skip


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose widths are multiples of 64: bitsandbytes 0.50.2 dequantises others wrongly on AVX512 CPUs."""
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


def quantised_by_transformers(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A 4-bit model of theirs, kept in training mode: in evaluation mode Linear4bit repacks its weights on a CPU."""
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=nf4(dtype), dtype=dtype, device_map="cpu"
    ).train()


def job_of(model: Path, data: Path, folder: Path, *overrides: str) -> Job:
    options = (f"train.max_steps={STEPS}", "train.global_batch=4", "train.micro_batch=4", "optim.warmup=0", *overrides)
    recipe = recipe_of(model, data, folder / "run", *options)
    log = Log(folder / "run", quiet=True)
    log.restart(0)
    return assemble(gather(recipe, open_processes(recipe), None, log), log, StopSignal())


def their_losses(model: Any, job: Job, rank: int, alpha: int) -> list[float]:
    """PEFT's LoRA from our start, on our rows, under torch's AdamW: the mean loss of every step."""
    inner: Any = job.model.model  # type: ignore[union-attr]
    leaves = sorted({path.rpartition(".")[2] for path in adapted(inner)})
    theirs = peft.get_peft_model(
        model, peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=leaves, task_type="CAUSAL_LM")
    )
    for path, layer in adapted(inner).items():
        module = theirs.base_model.model.get_submodule(path)
        with torch.no_grad():
            module.lora_A["default"].weight.copy_(layer.A)
            module.lora_B["default"].weight.copy_(layer.B)
    trainable = [p for p in theirs.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trainable) == sum(p.numel() for p in job.trainable.values())
    optim = job.optim
    optimizer = torch.optim.AdamW(
        trainable, lr=optim.learning_rate, betas=optim.betas, weight_decay=optim.weight_decay, foreach=False
    )
    return [_their_step(theirs, job, step, trainable, optimizer) for step in range(STEPS)]


def _their_step(model: Any, job: Job, step: int, trainable: Sequence[Tensor], optimizer: Any) -> float:
    rows = Sampler(job.order, job.settings.global_batch, job.settings.seed).rows(job.train, step)
    batch = collate([job.train[row] for row in rows], pad_id=0)
    out = model(input_ids=batch.input_ids, position_ids=batch.position_ids).logits[:, :-1].float()
    loss = F.cross_entropy(out.flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORED)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trainable, job.optim.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def same_curve(job: Job, theirs: list[float], folder: Path) -> None:
    fit(job, Position())
    ours = [line["loss"] for line in read_metrics(folder / "run") if line["event"] == "train"]
    assert len(ours) == len(theirs) == STEPS
    assert max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True)) <= 1e-3
    assert ours[-1] < 0.97 * ours[0]  # it did learn


@pytest.mark.xdist_group("peft")
def test_the_frozen_base_is_that_of_transformers_and_bitsandbytes(wide: Path) -> None:
    import bitsandbytes

    ours, theirs = base_of(wide, "nf4").model, quantised_by_transformers(wide)
    compared = 0
    for path, module in theirs.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert torch.equal(ours.get_submodule(path).weight(torch.float32), weight.float())
            compared += 1
    assert compared == 14
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-4)


@pytest.mark.xdist_group("peft")
def test_training_goes_as_pefts_on_a_random_model(wide: Path, tmp_path: Path) -> None:
    job = job_of(wide, write_rows(tmp_path / "rows.jsonl", 24), tmp_path)
    same_curve(job, their_losses(quantised_by_transformers(wide), job, rank=4, alpha=8), tmp_path)


@pytest.mark.xdist_group("peft")
def test_training_in_bfloat16_differs_from_pefts_less_than_pefts_from_another_start(wide: Path, tmp_path: Path) -> None:
    """Another order of roundings moves the curve less than another random A does, at every step after the first ten."""
    job = job_of(wide, write_rows(tmp_path / "rows.jsonl", 24), tmp_path, "model.dtype=bfloat16")
    layers = list(adapted(job.model.model).values())  # type: ignore[arg-type]
    own = [layer.A.detach().clone() for layer in layers]

    def theirs(seed: int | None) -> np.ndarray[Any, Any]:
        generator = torch.Generator().manual_seed(seed or 0)
        for layer, start in zip(layers, own, strict=True):
            layer.reset(generator)
            if seed is None:
                layer.A.data.copy_(start)
        return np.array(their_losses(quantised_by_transformers(wide, torch.bfloat16), job, rank=4, alpha=8))

    starts = [theirs(seed) for seed in (1, 2, 3)]
    same = theirs(None)
    fit(job, Position())
    ours = np.array([line["loss"] for line in read_metrics(tmp_path / "run") if line["event"] == "train"])
    spread = np.ptp([same, *starts], axis=0)
    assert (np.abs(ours - same)[10:] < spread[10:]).all()
    assert np.abs(ours - same).max() / same[0] < 0.02


@pytest.mark.xdist_group("peft")
@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here: no pretrained model, no GSM8K")
def test_training_goes_as_pefts_on_a_pretrained_model_and_gsm8k(tmp_path: Path) -> None:
    model, rows = SHARED / "stories260K", (SHARED / "gsm8k" / "train.jsonl").read_text().splitlines()
    data = tmp_path / "gsm8k.jsonl"
    turned = (json.loads(row) for row in sorted(rows[:300], key=len)[:32])
    data.write_text(
        "".join(json.dumps({"prompt": row["question"], "completion": row["answer"]}) + "\n" for row in turned)
    )
    job = job_of(model, data, tmp_path, "data.max_length=400", "adapter.rank=8", "adapter.alpha=16")
    assert len(job.train) >= 30
    same_curve(job, their_losses(quantised_by_transformers(model), job, rank=8, alpha=16), tmp_path)


@pytest.mark.xdist_group("peft")
def test_a_4_bit_checkpoint_of_transformers_is_trained_on_and_merged(wide: Path, tmp_path: Path) -> None:
    stored = tmp_path / "stored"
    quantised_by_transformers(wide).save_pretrained(stored)
    byte_tokenizer().save_pretrained(stored)
    ours, fresh = base_of(stored, "nf4"), base_of(wide, "nf4")
    for (path, one), (_, other) in zip(_frozen(ours), _frozen(fresh), strict=True):
        assert torch.equal(one.weight(torch.float32), other.weight(torch.float32)), path
    assert torch.equal(logits(ours.model), logits(fresh.model))
    walk(recipe_of(stored, write_rows(tmp_path / "rows.jsonl", 12), tmp_path / "run", "train.max_steps=2"), quiet=True)
    opened = load_run(str(tmp_path / "run"))
    order = ExportRequest(to="merged", onto="dequantized", dtype="float32", data=None, rows=2)
    agreement = export_run(opened, order, str(tmp_path / "merged"))["agreement"]
    assert agreement["top1"] == 1.0 and agreement["max_logit_difference"] <= 1e-4
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    torch.testing.assert_close(logits(plain(tmp_path / "merged")), logits(opened.base.model), rtol=0, atol=1e-4)
    with pytest.raises(InputError, match="original"):
        export_run(opened, replace(order, onto="original"), str(tmp_path / "original"))
    assert not (tmp_path / "original").exists()


def _frozen(base: Base) -> list[tuple[str, FrozenLinear]]:
    return [(path, module) for path, module in base.model.named_modules() if isinstance(module, FrozenLinear)]
