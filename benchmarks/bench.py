"""What all benchmarks share: contenders in processes of their own that step on command, medians, the machine."""

import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Contender = Callable[..., Any]  # (step_gate, **settings): calls the gate around every step


def resident_bytes() -> int:
    """What this process holds now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    """The most this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Race:
    """Contenders loaded once each in a process of its own, stepped in turn: A B C A B C ..., one at a time."""

    def __init__(self, contenders: dict[str, Contender], **settings: Any) -> None:
        self.lines: dict[str, Connection] = {}
        self.processes = []
        context = get_context("spawn")
        for name, contender in contenders.items():
            here, there = context.Pipe()
            self.processes.append(context.Process(target=_child, args=(contender, there, settings), daemon=True))
            self.processes[-1].start()
            there.close()  # so that a child that dies ends the race rather than hanging it
            self.lines[name] = here
            print(f"{name}: {here.recv()}", flush=True)  # loaded; the next one starts loading

    def run(self, warm_up: int, rounds: int) -> dict[str, dict[str, Any]]:
        """Seconds of every counted step, losses, and peak bytes above what the imports took."""
        steps: dict[str, list[dict[str, Any]]] = {name: [] for name in self.lines}
        for number in range(warm_up + rounds):
            order = list(self.lines) if number % 2 == 0 else list(reversed(self.lines))
            for name in order:
                self.lines[name].send("step")
                steps[name].append(self.lines[name].recv())
            taken = ", ".join(f"{name} {found[-1]['seconds']:.2f} s" for name, found in steps.items())
            print(f"round {number + 1}: {taken}", flush=True)
        for line in self.lines.values():
            line.send("end")
        for process in self.processes:  # what is measured next has the machine to itself
            process.join(timeout=30)
            process.terminate()
        return {name: _summary(found, warm_up) for name, found in steps.items()}


def _summary(found: list[dict[str, Any]], warm_up: int) -> dict[str, Any]:
    seconds = [step["seconds"] for step in found[warm_up:]]
    return {
        "first_loss": found[0]["loss"],
        "last_loss": found[-1]["loss"],
        "seconds": seconds,
        "median_seconds": statistics.median(seconds),
        "peak_bytes": found[-1]["peak_bytes"],
    }


def _child(contender: Contender, line: Connection, settings: dict[str, Any]) -> None:
    contender(Turnstile(line, settings.get("device", "cpu"), settings.pop("cap_bytes", None)), **settings)


class Turnstile:
    """A contender's end of the line: `ready` once loaded, then `wait` before and `done` after each step."""

    def __init__(self, line: Connection, device: str = "cpu", cap_bytes: int | None = None) -> None:
        self.line, self.device, self.cap_bytes = line, device, cap_bytes
        self.baseline = 0

    def imported(self) -> None:
        """All libraries are there, nothing is loaded yet: memory counts from here."""
        self.baseline = resident_bytes()
        if self.cap_bytes:  # a smaller card, as far as torch's allocator goes
            import torch

            torch.cuda.set_per_process_memory_fraction(self.cap_bytes / torch.cuda.mem_get_info()[1])

    def ready(self, text: str) -> None:
        """Loaded."""
        self.line.send(text)

    def wait(self) -> bool:
        """Until the next step may start; False at the end."""
        return bool(self.line.recv() == "step")

    def done(self, started: float, loss: float) -> None:
        """The step that began at `started` (time.perf_counter) is over, on the device too."""
        peak = peak_bytes() - self.baseline
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        self.line.send({"seconds": time.perf_counter() - started, "loss": loss, "peak_bytes": peak})


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    names = ("torch", "transformers", "accelerate", "bitsandbytes", "peft", "trl")
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    cards = os.popen("nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null").read().splitlines()
    return {
        "card": cards[0] if cards else None,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


def write(name: str, found: dict[str, Any]) -> Path:
    """Write results/NAME.json, with the machine."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **found}, indent=2) + "\n")
    return path
