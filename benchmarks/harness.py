"""Shared parts of the benchmarks: contenders in separate processes that step on command, medians, the machine."""

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
Contender = Callable[..., Any]  # (gate, **settings): calls the gate before and after every step


def resident_bytes() -> int:
    """Resident memory of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Race:
    """Contenders, each loaded once in its own process, stepped in turn: A B C C B A ..., one at a time."""

    def __init__(self, contenders: dict[str, Contender], **settings: Any) -> None:
        self.connections: dict[str, Connection] = {}
        self.processes = []
        context = get_context("spawn")
        for name, contender in contenders.items():
            parent_end, child_end = context.Pipe()
            self.processes.append(context.Process(target=_child, args=(contender, child_end, settings), daemon=True))
            self.processes[-1].start()
            child_end.close()  # a child that dies then ends the race with EOFError instead of a hang
            self.connections[name] = parent_end
            print(f"{name}: {parent_end.recv()}", flush=True)  # loaded; the next one starts loading

    def run(self, warm_up: int, rounds: int) -> dict[str, dict[str, Any]]:
        """Seconds of every counted step, losses, and peak bytes above those after the imports."""
        steps: dict[str, list[dict[str, Any]]] = {name: [] for name in self.connections}
        for number in range(warm_up + rounds):
            order = list(self.connections) if number % 2 == 0 else list(reversed(self.connections))
            for name in order:
                self.connections[name].send("step")
                steps[name].append(self.connections[name].recv())
            timings = ", ".join(f"{name} {history[-1]['seconds']:.2f} s" for name, history in steps.items())
            print(f"round {number + 1}: {timings}", flush=True)
        for connection in self.connections.values():
            connection.send("end")
        for process in self.processes:  # they must not run during the next measurement
            process.join(timeout=30)
            process.terminate()
        return {name: _summary(history, warm_up) for name, history in steps.items()}


def _summary(steps: list[dict[str, Any]], warm_up: int) -> dict[str, Any]:
    seconds = [step["seconds"] for step in steps[warm_up:]]
    return {
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "seconds": seconds,
        "median_seconds": statistics.median(seconds),
        "processor_seconds": [step["processor_seconds"] for step in steps[warm_up:]],
        "peak_bytes": steps[-1]["peak_bytes"],
    }


def _child(contender: Contender, connection: Connection, settings: dict[str, Any]) -> None:
    contender(StepGate(connection, settings.get("device", "cpu"), settings.pop("cap_bytes", None)), **settings)


class StepGate:
    """A contender's end of the pipe: `ready` once loaded, then `wait` before and `done` after each step."""

    def __init__(self, connection: Connection, device: str = "cpu", cap_bytes: int | None = None) -> None:
        self.connection, self.device, self.cap_bytes = connection, device, cap_bytes
        self.baseline, self.processor_started = 0, 0.0

    def imported(self) -> None:
        """Libraries are imported, nothing is loaded yet: memory counts from here."""
        self.baseline = resident_bytes()
        if self.cap_bytes:  # a smaller GPU, as far as torch's allocator is concerned
            import torch

            torch.cuda.set_per_process_memory_fraction(self.cap_bytes / torch.cuda.mem_get_info()[1])

    def ready(self, text: str) -> None:
        """Tell the parent that the model is loaded."""
        self.connection.send(text)

    def wait(self) -> bool:
        """Block until the next step may start; False at the end."""
        goes_on = bool(self.connection.recv() == "step")
        self.processor_started = time.process_time()
        return goes_on

    def done(self, started: float, loss: float) -> None:
        """Report the step that began at `started` (time.perf_counter), once the device has finished it too."""
        peak = peak_bytes() - self.baseline
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        times = {
            "seconds": time.perf_counter() - started,
            "processor_seconds": time.process_time() - self.processor_started,  # other programs change them little
        }
        self.connection.send({**times, "loss": loss, "peak_bytes": peak})


def machine() -> dict[str, Any]:
    """Hardware and library versions that the figures were measured on."""
    names = ("torch", "transformers", "accelerate", "bitsandbytes", "peft", "trl")
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    gpus = os.popen("nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null").read().splitlines()
    return {
        "card": gpus[0] if gpus else None,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


def write(name: str, results: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write results/NAME.json, with the machine."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **results}, indent=2) + "\n")
    return path
