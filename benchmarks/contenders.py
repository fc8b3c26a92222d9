"""Contenders of speed.py: this project, transformers + PEFT as in the QLoRA authors' scripts, and TRL's SFTTrainer.

A contender loads its base model, runs one step whenever its gate opens, and reports seconds and loss of each step.
"""

import tempfile
import time
from typing import Any

from harness import StepGate
from workloads import ALPHA, LEARNING_RATE, RANK, TARGETS, token_lists

PER_DEVICE_BATCH = 8  # TRL's default; larger batches are accumulated


def qlora(
    gate: StepGate, recompute: int | None = 0, compiled: bool = False, optim: str = "paged_adamw_32bit", **work: Any
) -> None:
    """The project under test: its loading, adapters, loss and optimizer, assembled as in `qlora train`.

    `recompute`: number of layers, from the first, that recompute (None: all). Default: all activations are kept.
    """
    import torch

    from qlora.adapters.step_casts import casts_kept
    from qlora.training import OPTIMIZERS
    from qlora.training.compile import compile_layers
    from qlora.training.loss import TokenLoss
    from qlora.training.optimizers import parameter_groups

    optimizers, device = OPTIMIZERS[optim], torch.device(work["device"])
    base = adapted_base(gate, recompute, work)
    if compiled:
        compile_layers(base.model, device)
    loss = TokenLoss(base.model).train()
    trainable = {name: value for name, value in base.model.named_parameters() if value.requires_grad}
    optimizer = optimizers.build(parameter_groups(trainable, LEARNING_RATE, None), (0.9, 0.999), 0.0)
    examples = token_lists(work["batch"] * work["steps"], work["length"], work["short"])
    gate.ready("loaded")
    while gate.wait():
        started = time.perf_counter()
        batch, examples = examples[: work["batch"]], examples[work["batch"] :]
        micro_batches = _micro_batches(batch, work["length"], work["short"])
        trained_tokens = sum(micro_batch.trained_tokens for micro_batch in micro_batches)
        total = 0.0
        with casts_kept(device):
            for micro_batch in micro_batches:
                micro = micro_batch.to(device)
                mean = loss(micro.input_ids, micro.labels, micro.position_ids, micro.layout) / trained_tokens
                mean.backward()
                total += mean.detach()
        torch.nn.utils.clip_grad_norm_(list(trainable.values()), 0.3)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        gate.done(started, float(total))


def adapted_base(gate: StepGate, recompute: int | None, work: dict[str, Any]) -> Any:
    """The project's 4-bit base with LoRA on all linear layers. `recompute`: layers that recompute (None: all)."""
    import torch

    from qlora.adapters.inject import inject
    from qlora.adapters.lora import Lora
    from qlora.memory.activation_recompute import recompute as recompute_layers
    from qlora.memory.malloc import keep_freed_memory
    from qlora.model import Model
    from qlora.model.load_base import load
    from qlora.quant import Quant, build_quantizer

    device = torch.device(work["device"])
    gate.imported()
    if device.type == "cpu":
        keep_freed_memory()
    base = load(Model(name=work["folder"], dtype=work["dtype"]), build_quantizer(Quant()), device)
    inject(base.model, Lora(RANK, ALPHA, 0.0), "all-linear", 0)
    recompute_layers(base.model, recompute)
    return base


def _micro_batches(batch: list[list[int]], length: int, short: bool) -> list[Any]:
    """Micro-batches of a step: one packed sequence each for short examples, else one micro-batch of all examples."""
    import numpy as np

    from qlora.data.batching.collate import collate
    from qlora.data.batching.packing import pack
    from qlora.data.types import Example

    examples = [Example("", np.array(ids, np.int32), np.array(ids, np.int32)) for ids in batch]
    return [collate([sequence], 0) for sequence in pack(examples, length)] if short else [collate(examples, 0)]


def qlora_recomputing(gate: StepGate, **work: Any) -> None:
    """The same with every layer recomputed: the least memory."""
    qlora(gate, recompute=None, **work)


def qlora_compiled(gate: StepGate, **work: Any) -> None:
    """The same with train.compile."""
    qlora(gate, compiled=True, **work)


def qlora_fused_adamw(gate: StepGate, **work: Any) -> None:
    """The same with torch's fused AdamW, whose moments stay on the GPU."""
    qlora(gate, optim="adamw", **work)


def unsloth_plain_loop(gate: StepGate, **work: Any) -> None:
    """B2: Unsloth's loading and LoRA with its own kernels, in a plain loop."""
    import unsloth  # isort: skip - before torch and transformers, as it asks
    import torch

    gate.imported()
    options = {"max_seq_length": work["length"], "load_in_4bit": True, "dtype": getattr(torch, work["dtype"])}
    model, _ = unsloth.FastLanguageModel.from_pretrained(work["folder"], **options)
    model = unsloth.FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, use_gradient_checkpointing=False
    ).train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, fused=True)
    examples = token_lists(work["batch"] * work["steps"], work["length"], work["short"])
    gate.ready("loaded")
    while gate.wait():
        started = time.perf_counter()
        batch, examples = examples[: work["batch"]], examples[work["batch"] :]
        ids, mask, labels = padded(batch, work["device"])
        loss = model(input_ids=ids, labels=labels, attention_mask=mask).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 0.3)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        gate.done(started, float(loss))


def peft_classic(gate: StepGate, **work: Any) -> None:
    """B0: PEFT set up as in the QLoRA authors' scripts."""
    import torch
    from bitsandbytes.optim import PagedAdamW32bit
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    gate.imported()
    model = prepare_model_for_kbit_training(four_bit_base(work), gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS)).train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = PagedAdamW32bit(trainable, lr=LEARNING_RATE)
    examples = token_lists(work["batch"] * work["steps"], work["length"], work["short"])
    gate.ready("loaded")
    while gate.wait():
        started = time.perf_counter()
        batch, examples = examples[: work["batch"]], examples[work["batch"] :]
        total = 0.0
        trained_tokens = sum(len(ids) - 1 for ids in batch)
        for start in range(0, len(batch), PER_DEVICE_BATCH):
            ids, mask, labels = padded(batch[start : start + PER_DEVICE_BATCH], work["device"])
            with torch.autocast(work["device"], dtype=torch.bfloat16, enabled=work["dtype"] == "bfloat16"):
                loss = model(input_ids=ids, labels=labels, attention_mask=mask).loss
            weighted = loss * (int((labels[:, 1:] != -100).sum()) / trained_tokens)
            weighted.backward()
            total += float(weighted)
        torch.nn.utils.clip_grad_norm_(trainable, 0.3)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        gate.done(started, total)


def trl_defaults(gate: StepGate, **work: Any) -> None:
    """B1: SFTTrainer with its defaults; only base, adapter and batch size are set."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    gate.imported()
    batch = min(work["batch"], PER_DEVICE_BATCH)
    with tempfile.TemporaryDirectory() as output:
        config = SFTConfig(
            output_dir=output, per_device_train_batch_size=batch, gradient_accumulation_steps=work["batch"] // batch,
            max_steps=work["steps"], max_length=work["length"], logging_steps=1, save_strategy="no", report_to=[],
            use_cpu=work["device"] == "cpu", disable_tqdm=True, learning_rate=LEARNING_RATE,
            train_sampling_strategy="sequential", bf16=work["dtype"] == "bfloat16",
        )  # fmt: skip
        lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
        examples = token_lists(work["batch"] * work["steps"], work["length"], work["short"])
        dataset = Dataset.from_dict({"input_ids": examples})
        base = four_bit_base(work)
        trainer = SFTTrainer(base, args=config, train_dataset=dataset, peft_config=lora, callbacks=[step_timer(gate)])
        gate.ready("loaded")
        trainer.train()


def step_timer(gate: StepGate) -> Any:
    """A callback of transformers' Trainer that waits at the gate before every step and reports it with its loss."""
    from transformers import TrainerCallback

    class StepTimer(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not gate.wait():
                raise SystemExit
            self.started = time.perf_counter()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **__: Any) -> None:
            if logs and "loss" in logs:
                gate.done(self.started, float(logs["loss"]))

    return StepTimer()


def four_bit_base(work: dict[str, Any]) -> Any:
    """The base model loaded by transformers and bitsandbytes."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = getattr(torch, work["dtype"])
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return AutoModelForCausalLM.from_pretrained(
        work["folder"], quantization_config=four_bit, dtype=dtype, device_map={"": work["device"]}
    )


def padded(examples: list[list[int]], device: str) -> tuple[Any, Any, Any]:
    """Token ids, mask and labels, padded to the longest example."""
    import torch

    longest = max(map(len, examples))
    ids = torch.tensor([tokens + [2] * (longest - len(tokens)) for tokens in examples], device=device)
    mask = torch.tensor([[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens in examples], device=device)
    return ids, mask, ids.masked_fill(mask == 0, -100)
