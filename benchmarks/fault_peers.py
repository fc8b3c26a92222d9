"""The same faults on the peers: Trainer of transformers with PEFT, and save_state of accelerate. A smaller number.

Killed at random moments while they save after every step; what they themselves pick to resume from is then loaded.
Writes results/fault_peers.json.  `python benchmarks/fault_peers.py [--kills 40]`
"""

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  offline, one thread
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from bench import RESULTS, machine
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from support.child_processes import Child, Tell
from support.tiny_models import save_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

STEPS = 12
Workload = Callable[[Path, Tell], None]


def rows() -> list[dict[str, list[int]]]:
    """Twelve rows of tokens, the same for all."""
    draw = random.Random(0)
    ids = [[draw.randrange(5, 250) for _ in range(24)] for _ in range(STEPS)]
    return [{"input_ids": each, "labels": each} for each in ids]


def lora(model: Path) -> torch.nn.Module:
    """The tiny model with PEFT's LoRA on it, as this project's tests train it."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))


class _Poison(TrainerCallback):
    """NaN in one gradient of one step."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        """Spoil it."""
        if state.global_step == 4:
            next(p for p in named["model"].parameters() if p.grad is not None).grad.fill_(float("nan"))


def train_hf(model: Path, poisoned: bool = False) -> Workload:
    """The Trainer of transformers with its defaults, saving after every step; resumes as it recommends."""

    def work(output: Path, tell: Tell) -> None:
        settings = TrainingArguments(
            str(output), max_steps=STEPS, save_steps=1, per_device_train_batch_size=1, report_to=[], use_cpu=True,
            disable_tqdm=True, save_total_limit=2, logging_steps=1,
        )  # fmt: skip
        trainer = Trainer(lora(model), settings, train_dataset=rows(), callbacks=[_Poison()] if poisoned else [])
        tell("training")
        trainer.train(resume_from_checkpoint=get_last_checkpoint(output) if output.is_dir() else None)
        trainer.save_model(str(output / "final"))

    return work


def usable_hf(model: Path, output: Path) -> bool:
    """Whether the checkpoint that Trainer picks can be resumed from, judged by loading what is in it."""
    newest = get_last_checkpoint(output) if output.is_dir() else None
    if newest is None:
        return True
    try:
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), newest)
        for name in ("optimizer.pt", "scheduler.pt"):
            torch.load(Path(newest) / name, weights_only=True)
        json.loads((Path(newest) / "trainer_state.json").read_text())
    except Exception:
        return False
    return (Path(newest) / "rng_state.pth").is_file()


def train_accelerate(model: Path) -> Workload:
    """A loop with accelerate's save_state after every step, the last two kept by its own naming."""

    def work(output: Path, tell: Tell) -> None:
        for state in (AcceleratorState, PartialState, GradientState):
            state._shared_state.clear()
        accelerator = _accelerator(output)
        module = lora(model)
        optimizer = torch.optim.AdamW((p for p in module.parameters() if p.requires_grad), lr=1e-3)
        module, optimizer = accelerator.prepare(module, optimizer)
        if (output / "checkpoints").is_dir() and any((output / "checkpoints").iterdir()):
            accelerator.load_state()
        tell("training")
        for row in rows():
            ids = torch.tensor([row["input_ids"]])
            accelerator.backward(module(input_ids=ids, labels=ids).loss)
            optimizer.step()
            optimizer.zero_grad()
            accelerator.save_state()

    return work


def _accelerator(output: Path) -> Accelerator:
    from accelerate.utils import ProjectConfiguration

    project = ProjectConfiguration(str(output), automatic_checkpoint_naming=True, total_limit=2)
    return Accelerator(cpu=True, project_config=project)


def usable_accelerate(model: Path, output: Path) -> bool:
    """Whether the newest folder, which load_state() picks, can be loaded."""
    folder = output / "checkpoints"
    found = sorted(folder.iterdir(), key=lambda path: int(path.name.split("_")[1])) if folder.is_dir() else []
    if not found:
        return True
    try:
        load_file(found[-1] / "model.safetensors")
        torch.load(found[-1] / "optimizer.bin", weights_only=True)
    except Exception:
        return False
    return (
        (found[-1] / "random_states_0.pkl").stat().st_size > 0
        if (found[-1] / "random_states_0.pkl").exists()
        else False
    )


def killed(home: Path, work: Workload, usable: Callable[[Path], bool], kills: int) -> dict[str, int]:
    """`kills` random moments of training; how often the newest checkpoint was unusable. Each run starts anew."""
    draw, found = random.Random(0), {"kills": 0, "unusable": 0}
    output = home / "out"
    seconds = _seconds(home, work)
    while found["kills"] < kills:
        shutil.rmtree(output, ignore_errors=True)
        child = Child(lambda tell: work(output, tell), home / "said")
        if not child.wait_for("training"):
            raise RuntimeError((home / "said").read_text()[-2000:])
        time.sleep(draw.uniform(0, seconds))
        child.send(signal.SIGKILL)
        if child.end() == 128 + signal.SIGKILL:
            found["kills"] += 1
            found["unusable"] += not usable(output)
            print(found, flush=True)
    return found


def _seconds(home: Path, work: Workload) -> float:
    """How long training takes from its first line on, once warm."""
    for name in ("warm", "timed"):
        output = home / name
        child = Child(lambda tell, output=output: work(output, tell), home / "said")
        child.wait_for("training")
        started = time.monotonic()
        if child.end():
            raise RuntimeError((home / "said").read_text()[-2000:])
    return time.monotonic() - started


def poisoned(home: Path, model: Path) -> dict[str, Any]:
    """One NaN gradient: how the run ends, and how many saved values are not finite."""
    output = home / "poisoned"
    code = Child(lambda tell: train_hf(model, poisoned=True)(output, tell), home / "said").end()
    values = load_file(output / "final" / "adapter_model.safetensors").values() if code == 0 else []
    return {
        "exit_code": code,
        "values": sum(value.numel() for value in values),
        "non_finite_values": sum(int((~value.isfinite()).sum()) for value in values),
    }


def flipped(home: Path, model: Path, flips: int) -> dict[str, int]:
    """Bits flipped in a PEFT adapter; how many load without a word, with other values."""
    folder, draw = home / "peft", random.Random(0)
    lora(model).save_pretrained(folder)
    path, found = folder / "adapter_model.safetensors", {"flips": 0, "undetected": 0}
    # Cloned: what safetensors gives is a map of the file, which is about to be spoilt.
    whole, tensors = path.read_bytes(), {name: value.clone() for name, value in load_file(path).items()}
    for _ in range(flips):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        path.write_bytes(bytes(damaged))
        found["flips"] += 1
        try:
            again = load_file(path)
        except Exception:
            continue
        same = again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)
        found["undetected"] += not same
    return found


def main() -> None:
    """Run all, and write the results."""
    reader = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    reader.add_argument("--kills", type=int, default=40)
    chosen = reader.parse_args()
    home = Path(tempfile.mkdtemp(prefix="peers-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    try:
        model = save_model(home / "model", "llama")
        hf = killed(home, train_hf(model), lambda output: usable_hf(model, output), chosen.kills)
        for name in ("warm", "timed"):
            shutil.rmtree(home / name)
        own = killed(home, train_accelerate(model), lambda output: usable_accelerate(model, output), chosen.kills)
        poison, flips = poisoned(home, model), flipped(home, model, 200)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    found = {"trainer": hf, "accelerate": own, "poison": poison, "flips": flips}
    (RESULTS / "fault_peers.json").write_text(json.dumps({"machine": machine(), **found}, indent=2) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
