"""Tokens per second and peak memory against the peers, on the same rows in one run: python benchmarks/speed.py --help.

B0 is transformers + peft's prepare_model_for_kbit_training + bitsandbytes under autocast, with gradient checkpointing;
B1 is TRL's SFTTrainer with its own defaults on a bitsandbytes base. A random 100M Llama stands for the base.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import Gate, Race, write

SHAPE = {
    "vocab_size": 32_000, "hidden_size": 768, "intermediate_size": 2_048, "num_hidden_layers": 12,
    "num_attention_heads": 12, "num_key_value_heads": 12, "max_position_embeddings": 2_048, "tie_word_embeddings": True,
}  # fmt: skip
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA, LEARNING_RATE = 16, 32, 2e-4


def make_base(folder: Path) -> None:
    """A random Llama in bfloat16, with a tokenizer that TRL can load."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16).save_pretrained(folder)
    words = {f"w{number}": number for number in range(SHAPE["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1", pad_token="w2").save_pretrained(folder)


def rows_of(count: int, length: int) -> list[list[int]]:
    """The same random rows for everybody."""
    import torch

    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, SHAPE["vocab_size"], (count, length), generator=generator).tolist()  # type: ignore[no-any-return]


def ours(gate: Gate, folder: str, batch: int, length: int, steps: int, recompute: str = "all") -> None:
    """The project itself: its own loading, adapters, loss and optimiser, as `qlora train` puts them together."""
    import numpy as np
    import torch

    from qlora.adapters.inject import inject
    from qlora.adapters.lora import Lora
    from qlora.base import Model
    from qlora.base.load import load
    from qlora.data.batches import collate
    from qlora.data.types import Example
    from qlora.memory.recompute import recompute as recompute_layers
    from qlora.quant.nf4 import Nf4
    from qlora.train import OPTIMIZERS
    from qlora.train.loss import TokenLoss
    from qlora.train.optim import groups

    optimizers = OPTIMIZERS["paged_adamw_32bit"]
    gate.imported()
    base = load(Model(name=folder), Nf4(), torch.device("cpu"))
    inject(base.model, Lora(RANK, ALPHA), "all-linear", 0)
    recompute_layers(base.model, None if recompute == "all" else 0)
    loss = TokenLoss(base.model).train()
    trainable = {name: value for name, value in base.model.named_parameters() if value.requires_grad}
    optimizer = optimizers.build(groups(trainable, LEARNING_RATE, None), (0.9, 0.999), 0.0)
    rows = rows_of(batch * steps, length)
    gate.ready("loaded")
    while gate.wait():
        started = time.perf_counter()
        taken, rows = rows[:batch], rows[batch:]
        examples = [Example("", np.array(row, np.int32), np.array(row, np.int32)) for row in taken]
        micro = collate(examples, 0)
        total = loss(micro.input_ids, micro.labels, micro.position_ids, micro.starts) / micro.trained_tokens
        total.backward()
        torch.nn.utils.clip_grad_norm_(list(trainable.values()), 0.3)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        gate.done(time.perf_counter() - started, total.item())


def ours_kept(gate: Gate, **settings: Any) -> None:
    """The same, with activations kept instead of recomputed."""
    ours(gate, recompute="none", **settings)


def peft_classic(gate: Gate, folder: str, batch: int, length: int, steps: int) -> None:
    """B0: the recipe of the original scripts, as its users write it."""
    import torch
    from bitsandbytes.optim import PagedAdamW32bit
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    gate.imported()
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=four_bit, dtype=torch.bfloat16)
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS)).train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = PagedAdamW32bit(trainable, lr=LEARNING_RATE)
    rows = rows_of(batch * steps, length)
    gate.ready("loaded")
    while gate.wait():
        started = time.perf_counter()
        taken, rows = torch.tensor(rows[:batch]), rows[batch:]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=taken, labels=taken, attention_mask=torch.ones_like(taken)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 0.3)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        gate.done(time.perf_counter() - started, loss.item())


def trl_defaults(gate: Gate, folder: str, batch: int, length: int, steps: int) -> None:
    """B1: SFTTrainer as it comes, told the base, the adapter and the batch."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Timed(TrainerCallback):
        """Stops at the gate before every step."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not gate.wait():
                raise SystemExit
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds = time.perf_counter() - self.started

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **__: Any) -> None:
            if logs and "loss" in logs:
                gate.done(self.seconds, float(logs["loss"]))

    gate.imported()
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=four_bit, dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as output:
        config = SFTConfig(
            output_dir=output, per_device_train_batch_size=batch, gradient_accumulation_steps=1, max_steps=steps,
            max_length=length, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
            learning_rate=LEARNING_RATE, train_sampling_strategy="sequential",
        )  # fmt: skip
        lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
        rows = Dataset.from_dict({"input_ids": rows_of(batch * steps, length)})
        trainer = SFTTrainer(model, args=config, train_dataset=rows, peft_config=lora, callbacks=[Timed()])
        gate.ready("loaded")
        trainer.train()


def main() -> None:
    """Race all contenders and write results/speed.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--only", nargs="*", default=[])
    options = parser.parse_args()
    contenders = {"ours": ours, "ours, activations kept": ours_kept, "B1 TRL": trl_defaults, "B0 PEFT": peft_classic}
    chosen = {name: run for name, run in contenders.items() if not options.only or name in options.only}
    with tempfile.TemporaryDirectory() as folder:
        make_base(Path(folder))
        settings = {"folder": folder, "batch": options.batch, "length": options.length}
        race = Race(chosen, steps=options.warm_up + options.rounds + 1, **settings)
        found = race.run(options.warm_up, options.rounds)
    tokens = options.batch * options.length
    for result in found.values():
        result["tokens_per_second"] = tokens / result["median_seconds"]
    for name, result in found.items():
        print(f"{name:24} {result['tokens_per_second']:8.1f} tokens/s  peak {result['peak_bytes'] / 2**20:8.0f} MiB"
              f"  first loss {result['first_loss']:.4f}")  # fmt: skip
    print(write("speed", {"tokens_per_step": tokens, "shape": SHAPE, "rank": RANK, "contenders": found}))


if __name__ == "__main__":
    main()
