"""Tables of docs/large-models.md, predicted by the memory planner: python benchmarks/large_models.py redraws them."""

import sys
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.published_models import work_of  # noqa: E402 - shapes that the tests compare with the real configurations

from qlora.memory.planner.cost_model import DeviceSpeed, seconds  # noqa: E402
from qlora.memory.planner.memory_plan import Budget  # noqa: E402
from qlora.memory.planner.search import choose  # noqa: E402
from qlora.memory.planner.workload import Workload  # noqa: E402

PAGE = ROOT / "docs/large-models.md"
GIB = 2**30
PLANS = (
    ("Llama-3.1-405B", 80, 256),
    ("Llama-3.1-70B", 12, 64),
    ("Llama-3.1-70B", 16, 64),
)  # GPU and host memory in GiB
NEWER = (
    ("Qwen3-30B-A3B", 8, 32),
    ("Qwen3.6-35B-A3B", 16, 32),
    ("gpt-oss-20b", 12, 32),
    ("Gemma-4-26B-A4B", 12, 32),
    ("Qwen3.6-27B", 16, 32),
    ("Mistral-Small-3.2-24B", 16, 32),
    ("GLM-4.7-Flash", 16, 32),
)
LENGTHS = (512, 2048, 4096, 8192)
REACHED = 0.65  # of a GPU's dense bfloat16 peak: the best published values are 0.62 to 0.71
GPUS = {"RTX 3090": 71e12, "RTX 4090": 165.2e12, "RTX 5090": 209.5e12, "A100": 312e12}  # FLOP/s
LINKS = {"3 x8": 6.25e9, "3 x16 or 4 x8": 12.5e9, "4 x16 or 5 x8": 25e9, "5 x16": 50e9}  # bytes/s of a copy, as reached
STEP, MOST = 32, 65_536  # tokens


def plans_table() -> str:
    """The planner's choice for models that exceed the GPU's memory."""
    return _table((plan, length) for plan in PLANS for length in LENGTHS)


def newer_table() -> str:
    """The planner's choice for hybrids and mixtures of experts, with a paged optimizer."""
    return _table(((plan, 2048) for plan in NEWER), optimizer="paged_adamw_8bit")


def _table(plans: Iterable[tuple[tuple[str, int, int], int]], **options: Any) -> str:
    """One line for each model on a GPU, and tokens of a sequence."""
    lines = [
        "| model | GPU | host memory | tokens | GPU peak | host peak | recomputed / offloaded / streamed | layers | "
        "seconds |"
    ]
    lines.append("|---" * 9 + "|")
    for (name, gpu_gib, host_gib), length in plans:
        cells = _planned(work_of(name, max_length=length, **options), gpu_gib, host_gib)
        lines.append(f"| {name} | {gpu_gib} GiB | {host_gib} GiB | {length:,} | {cells} |")
    return "\n".join(lines) + "\n"


def _planned(work: Workload, gpu_gib: int, host_gib: int) -> str:
    plan = choose(work, Budget(gpu_gib * GIB, host_gib * GIB))
    if not plan.fits:
        return "does not fit | | | |"
    layers = f"{plan.work.recomputed} / {plan.work.offloaded} / {plan.work.streamed}"
    return (
        f"{plan.peak_bytes / GIB:.1f} GiB | {plan.host_bytes / GIB:.1f} GiB | {layers} | {work.shapes.layers} | "
        f"{seconds(plan.work):.1f}"
    )


def free_table() -> str:
    """Tokens a micro-batch from which a fully streamed 70B takes no longer than a resident one."""
    lines = ["| GPU | " + " | ".join(f"PCIe {link}" for link in LINKS) + " |", "|---" * (len(LINKS) + 1) + "|"]
    for gpu, peak in GPUS.items():
        cells = [f"{free_from(DeviceSpeed(REACHED * peak, link)):,}" for link in LINKS.values()]
        lines.append(f"| {gpu} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def free_from(speed: DeviceSpeed) -> int:
    """The fewest tokens, in steps of STEP, at which computation hides every copy, with all layers recomputed."""
    work, lengths = work_of("Llama-3.1-70B"), range(STEP, MOST, STEP)

    def is_free(tokens: int) -> bool:
        resident = replace(work, max_length=tokens)
        return seconds(replace(resident, weights="stream"), speed) <= seconds(resident, speed)

    index = bisect_left(lengths, True, key=is_free)  # once free, it is free for every longer sequence
    if index == len(lengths):
        raise ValueError(f"streaming is never free at {speed}")
    return lengths[index]


TABLES: dict[str, Callable[[], str]] = {"plans": plans_table, "newer": newer_table, "free": free_table}


def redraw(text: str, tables: dict[str, Any] = TABLES) -> str:
    """`text` with every table between its markers redrawn."""
    for name, table in tables.items():
        before, begin, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        text = before + begin + table() + end + after
    return text


if __name__ == "__main__":
    PAGE.write_text(redraw(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
