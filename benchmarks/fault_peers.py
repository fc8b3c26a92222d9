"""The same faults in other libraries: transformers' Trainer with PEFT, and accelerate's save_state.

They are killed at random moments while they save after every step; then the checkpoint that they select to resume from
is loaded. Writes results/fault_peers.json.  `python benchmarks/fault_peers.py [--kills 40]`
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
from harness import RESULTS, machine
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from support.child_processes import Child, Notify
from support.tiny_models import save_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

STEPS = 12
TrainFunction = Callable[[Path, Notify], None]


def dataset() -> list[dict[str, list[int]]]:
    """Twelve examples of random tokens, the same for all libraries."""
    rng = random.Random(0)
    examples = [[rng.randrange(5, 250) for _ in range(24)] for _ in range(STEPS)]
    return [{"input_ids": ids, "labels": ids} for ids in examples]


def lora(model: Path) -> torch.nn.Module:
    """The tiny model of this project's tests, with PEFT's LoRA."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))


class _InjectNaN(TrainerCallback):
    """Sets one gradient to NaN in one step."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """Inject the NaN."""
        if state.global_step == 4:
            next(p for p in options["model"].parameters() if p.grad is not None).grad.fill_(float("nan"))


def train_with_trainer(model: Path, inject_nan: bool = False) -> TrainFunction:
    """The Trainer of transformers with its defaults, saving after every step; resumes as its documentation says."""

    def work(output: Path, notify: Notify) -> None:
        settings = TrainingArguments(
            str(output), max_steps=STEPS, save_steps=1, per_device_train_batch_size=1, report_to=[], use_cpu=True,
            disable_tqdm=True, save_total_limit=2, logging_steps=1,
        )  # fmt: skip
        trainer = Trainer(
            lora(model), settings, train_dataset=dataset(), callbacks=[_InjectNaN()] if inject_nan else []
        )
        notify("training")
        trainer.train(resume_from_checkpoint=get_last_checkpoint(output) if output.is_dir() else None)
        trainer.save_model(str(output / "final"))

    return work


def trainer_can_resume(model: Path, output: Path) -> bool:
    """Whether the files of the checkpoint that Trainer selects can be loaded."""
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


def train_with_accelerate(model: Path) -> TrainFunction:
    """A loop with accelerate's save_state after every step; its automatic naming keeps the last two."""

    def work(output: Path, notify: Notify) -> None:
        for state in (AcceleratorState, PartialState, GradientState):
            state._shared_state.clear()
        accelerator = _accelerator(output)
        module = lora(model)
        optimizer = torch.optim.AdamW((p for p in module.parameters() if p.requires_grad), lr=1e-3)
        module, optimizer = accelerator.prepare(module, optimizer)
        if (output / "checkpoints").is_dir() and any((output / "checkpoints").iterdir()):
            accelerator.load_state()
        notify("training")
        for example in dataset():
            ids = torch.tensor([example["input_ids"]])
            accelerator.backward(module(input_ids=ids, labels=ids).loss)
            optimizer.step()
            optimizer.zero_grad()
            accelerator.save_state()

    return work


def _accelerator(output: Path) -> Accelerator:
    from accelerate.utils import ProjectConfiguration

    project = ProjectConfiguration(str(output), automatic_checkpoint_naming=True, total_limit=2)
    return Accelerator(cpu=True, project_config=project)


def accelerate_can_resume(model: Path, output: Path) -> bool:
    """Whether the newest folder, which load_state() selects, can be loaded."""
    folder = output / "checkpoints"
    folders = sorted(folder.iterdir(), key=lambda path: int(path.name.split("_")[1])) if folder.is_dir() else []
    if not folders:
        return True
    try:
        load_file(folders[-1] / "model.safetensors")
        torch.load(folders[-1] / "optimizer.bin", weights_only=True)
    except Exception:
        return False
    random_states = folders[-1] / "random_states_0.pkl"
    return random_states.exists() and random_states.stat().st_size > 0


def kill_at_moments(home: Path, work: TrainFunction, usable: Callable[[Path], bool], kills: int) -> dict[str, int]:
    """Kill `kills` new runs at random moments of training; counts how often the newest checkpoint is unusable."""
    rng, result = random.Random(0), {"kills": 0, "unusable": 0}
    output = home / "out"
    seconds = _seconds(home, work)
    while result["kills"] < kills:
        shutil.rmtree(output, ignore_errors=True)
        child = Child(lambda notify: work(output, notify), home / "log")
        if not child.wait_for("training"):
            raise RuntimeError((home / "log").read_text()[-2000:])
        time.sleep(rng.uniform(0, seconds))
        child.send(signal.SIGKILL)
        if child.wait() == 128 + signal.SIGKILL:
            result["kills"] += 1
            result["unusable"] += not usable(output)
            print(result, flush=True)
    return result


def _seconds(home: Path, work: TrainFunction) -> float:
    """Seconds of training after the start, in a second run, without the first one's imports."""
    for name in ("warm", "timed"):
        output = home / name
        child = Child(lambda notify, output=output: work(output, notify), home / "log")
        child.wait_for("training")
        started = time.monotonic()
        if child.wait():
            raise RuntimeError((home / "log").read_text()[-2000:])
    return time.monotonic() - started


def inject_nan(home: Path, model: Path) -> dict[str, Any]:
    """One NaN gradient in a run of Trainer: its exit code, and how many saved values are not finite."""
    output = home / "injected"
    code = Child(lambda notify: train_with_trainer(model, inject_nan=True)(output, notify), home / "log").wait()
    values = load_file(output / "final" / "adapter_model.safetensors").values() if code == 0 else []
    return {
        "exit_code": code,
        "values": sum(value.numel() for value in values),
        "non_finite_values": sum(int((~value.isfinite()).sum()) for value in values),
    }


def flip_bits(home: Path, model: Path, flips: int) -> dict[str, int]:
    """Flip bits in a PEFT adapter; counts how many files load without an error, but with other values."""
    folder, rng = home / "peft", random.Random(0)
    lora(model).save_pretrained(folder)
    path, result = folder / "adapter_model.safetensors", {"flips": 0, "undetected": 0}
    # Cloned: safetensors maps the file, which is about to be damaged.
    content, tensors = path.read_bytes(), {name: value.clone() for name, value in load_file(path).items()}
    for _ in range(flips):
        damaged = bytearray(content)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(damaged))
        result["flips"] += 1
        try:
            loaded = load_file(path)
        except Exception:
            continue
        same = loaded.keys() == tensors.keys() and all(torch.equal(loaded[name], tensors[name]) for name in tensors)
        result["undetected"] += not same
    return result


def main() -> None:
    """Run all parts and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=40)
    kills = parser.parse_args().kills
    home = Path(tempfile.mkdtemp(prefix="peers-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    try:
        model = save_model(home / "model", "llama")
        trainer = kill_at_moments(home, train_with_trainer(model), lambda out: trainer_can_resume(model, out), kills)
        for name in ("warm", "timed"):
            shutil.rmtree(home / name)
        work = train_with_accelerate(model)
        accelerate = kill_at_moments(home, work, lambda out: accelerate_can_resume(model, out), kills)
        poison, flips = inject_nan(home, model), flip_bits(home, model, 200)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    results = {"trainer": trainer, "accelerate": accelerate, "poison": poison, "flips": flips}
    (RESULTS / "fault_peers.json").write_text(json.dumps({"machine": machine(), **results}, indent=2) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
