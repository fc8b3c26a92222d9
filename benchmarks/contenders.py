"""Who races in speed.py: this project, transformers + PEFT as the original scripts put them together, and TRL.

Each loads its base, then steps when its gate says so, and reports seconds and loss of every step.
"""

import tempfile
import time
from typing import Any

from bench import Turnstile
from workloads import ALPHA, LEARNING_RATE, RANK, TARGETS, rows_of

PER_DEVICE_BATCH = 8  # TRL's default; more rows a step are accumulated


def ours(gate: Turnstile, recompute: int | None = 0, compiled: bool = False, **work: Any) -> None:
    """The project itself: its own loading, adapters, loss and optimiser, as `qlora train` puts them together.

    `recompute`: the first layers that do (None: all); the planner keeps all activations where they fit.
    """
    import torch

    from qlora.adapters.inject import inject
    from qlora.adapters.lora import Lora
    from qlora.memory.activation_recompute import recompute as recompute_layers
    from qlora.memory.malloc import keep_freed_memory
    from qlora.model import Model
    from qlora.model.load_base import load
    from qlora.quant.nf4 import Nf4
    from qlora.training import OPTIMIZERS
    from qlora.training.compile import compile_layers
    from qlora.training.loss import TokenLoss
    from qlora.training.optimizers import groups

    optimizers, device = OPTIMIZERS["paged_adamw_32bit"], torch.device(work["device"])
    gate.imported()
    if device.type == "cpu":
        keep_freed_memory()
    base = load(Model(name=work["folder"]), Nf4(), device)
    inject(base.model, Lora(RANK, ALPHA), "all-linear", 0)
    recompute_layers(base.model, recompute)
    if compiled:
        compile_layers(base.model, device)
    loss = TokenLoss(base.model).train()
    trainable = {name: value for name, value in base.model.named_parameters() if value.requires_grad}
    optimizer = optimizers.build(groups(trainable, LEARNING_RATE, None), (0.9, 0.999), 0.0)
    rows = rows_of(work["batch"] * work["steps"], work["length"], work["short"])
    gate.ready("loaded")
    while gate.wait():
        started = time.perf_counter()
        taken, rows = rows[: work["batch"]], rows[work["batch"] :]
        micros = _micro_batches(taken, work["length"], work["short"])
        trained = sum(micro.trained_tokens for micro in micros)
        total = 0.0
        for micro in micros:
            micro = micro.to(device)
            summed = loss(micro.input_ids, micro.labels, micro.position_ids, micro.starts) / trained
            summed.backward()
            total += summed.detach()
        torch.nn.utils.clip_grad_norm_(list(trainable.values()), 0.3)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        gate.done(started, float(total))


def _micro_batches(rows: list[list[int]], length: int, short: bool) -> list[Any]:
    """A step's rows as the loop would have them: short ones packed, a packed row a micro-batch; others all at once."""
    import numpy as np

    from qlora.data.batching.collate import collate
    from qlora.data.batching.packing import pack
    from qlora.data.types import Example

    examples = [Example("", np.array(row, np.int32), np.array(row, np.int32)) for row in rows]
    return [collate([row], 0) for row in pack(examples, length)] if short else [collate(examples, 0)]


def ours_recomputing(gate: Turnstile, **work: Any) -> None:
    """The same with every layer recomputed: the least memory."""
    ours(gate, recompute=None, **work)


def ours_compiled(gate: Turnstile, **work: Any) -> None:
    """The same with train.compile."""
    ours(gate, compiled=True, **work)


def peft_classic(gate: Turnstile, **work: Any) -> None:
    """B0: the recipe of the original scripts, as its users write it."""
    import torch
    from bitsandbytes.optim import PagedAdamW32bit
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    gate.imported()
    model = prepare_model_for_kbit_training(four_bit_base(work), gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS)).train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = PagedAdamW32bit(trainable, lr=LEARNING_RATE)
    rows = rows_of(work["batch"] * work["steps"], work["length"], work["short"])
    gate.ready("loaded")
    while gate.wait():
        started = time.perf_counter()
        taken, rows = rows[: work["batch"]], rows[work["batch"] :]
        total = 0.0
        counted = sum(len(row) - 1 for row in taken)
        for start in range(0, len(taken), PER_DEVICE_BATCH):
            ids, mask, labels = padded(taken[start : start + PER_DEVICE_BATCH], work["device"])
            with torch.autocast(work["device"], dtype=torch.bfloat16):
                loss = model(input_ids=ids, labels=labels, attention_mask=mask).loss
            share = loss * (int((labels[:, 1:] != -100).sum()) / counted)
            share.backward()
            total += float(share)
        torch.nn.utils.clip_grad_norm_(trainable, 0.3)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        gate.done(started, total)


def trl_defaults(gate: Turnstile, **work: Any) -> None:
    """B1: SFTTrainer as it comes, told the base, the adapter and the batch."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Timed(TrainerCallback):
        """Stops at the gate before every step."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not gate.wait():
                raise SystemExit
            self.started = time.perf_counter()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **__: Any) -> None:
            if logs and "loss" in logs:
                gate.done(self.started, float(logs["loss"]))

    gate.imported()
    batch = min(work["batch"], PER_DEVICE_BATCH)
    with tempfile.TemporaryDirectory() as output:
        config = SFTConfig(
            output_dir=output, per_device_train_batch_size=batch, gradient_accumulation_steps=work["batch"] // batch,
            max_steps=work["steps"], max_length=work["length"], logging_steps=1, save_strategy="no", report_to=[],
            use_cpu=work["device"] == "cpu", disable_tqdm=True, learning_rate=LEARNING_RATE,
            train_sampling_strategy="sequential",
        )  # fmt: skip
        lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
        rows = Dataset.from_dict({"input_ids": rows_of(work["batch"] * work["steps"], work["length"], work["short"])})
        base = four_bit_base(work)
        trainer = SFTTrainer(base, args=config, train_dataset=rows, peft_config=lora, callbacks=[Timed()])
        gate.ready("loaded")
        trainer.train()


def four_bit_base(work: dict[str, Any]) -> Any:
    """The base as transformers and bitsandbytes load it."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four_bit = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(
        work["folder"], quantization_config=four_bit, dtype=torch.bfloat16, device_map={"": work["device"]}
    )


def padded(rows: list[list[int]], device: str) -> tuple[Any, Any, Any]:
    """Token ids, mask and labels of rows padded to the longest."""
    import torch

    longest = max(map(len, rows))
    ids = torch.tensor([row + [2] * (longest - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    return ids, mask, ids.masked_fill(mask == 0, -100)
