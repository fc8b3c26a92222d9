"""Memory of a GPU beside tensors, and a profile of one micro-batch: 8B, or a smaller shape for a try.

`python benchmarks/gpu_memory.py peaks|profile` writes results/gpu-memory-NAME.json. PYTORCH_ALLOC_CONF sets the
allocator: run it with and without expandable_segments:True.
"""

import argparse
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from gpu_report import Report
from memory import CONFIGS, RandomModel, reset_peak, work_of

from qlora.memory.planner.memory_plan import Budget, plan
from qlora.memory.planner.overhead import CONTEXT_BYTES
from qlora.memory.planner.workload import Workload
from qlora.training.loss import TokenLoss

MODEL, LENGTHS, RANK = "Llama-3.1-8B", (2048, 8192, 16384), 16
SETTING = "expandable" if "expandable" in os.environ.get("PYTORCH_ALLOC_CONF", "") else "default"
TOLERANCE = 0.03
ACTIVITIES = (torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA)


def workload(name: str = MODEL) -> Workload:
    """One sequence, nothing packed, fused AdamW."""
    return replace(work_of(name, rank=RANK), optimizer="adamw", packing=False)


def peaks(report: Report, model: RandomModel, work: Workload, lengths: tuple[int, ...] = LENGTHS) -> None:
    """Item 5: allocated and reserved bytes next to the plan; bytes of the context."""
    report.check("context", context)
    for length, recompute in product(lengths, (work.shapes.layers, 0)):
        variant = replace(work, max_length=length, recompute=recompute)
        report.check(f"{length} tokens, {recompute} layers recompute, {SETTING}", lambda v=variant: peak(model, v))


def context() -> dict[str, Any]:
    """Device memory that is used and not allocated by torch, after a product in each of two threads' libraries."""
    matrix = torch.randn(256, 256, device="cuda", requires_grad=True)
    (matrix @ matrix).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    used = total - free - torch.cuda.memory_reserved()
    return {"context_bytes": used, "planned_bytes": CONTEXT_BYTES, "right": used <= CONTEXT_BYTES}


def peak(model: RandomModel, work: Workload) -> dict[str, Any]:
    """Right if no more is allocated than planned, and no less than TOLERANCE below it (the kernels take less)."""
    free = torch.cuda.mem_get_info()[1]
    planned = plan(work, Budget(free)).allocated_bytes
    if planned > free:
        return {"planned_bytes": planned, "left_out": "does not fit this GPU", "right": True}
    reset_peak(model.device)
    allocated = model.step(work)
    reserved = torch.cuda.max_memory_reserved()
    sizes = {"allocated_bytes": allocated, "reserved_bytes": reserved, "planned_bytes": planned}
    return {**sizes, "fragmentation": reserved / max(1, allocated) - 1, "right": allocated <= (1 + TOLERANCE) * planned}


def profile(
    report: Report, model: RandomModel, work: Workload, length: int = 2048, activities: Sequence[Any] = ACTIVITIES
) -> None:
    """Item 4: how busy the GPU is in a micro-batch, its kernels by time, launches."""
    variant = replace(work, max_length=length, recompute=0)
    report.check(f"profile of {length} tokens", lambda: profiled(model, variant, activities))


def profiled(model: RandomModel, work: Workload, activities: Sequence[Any]) -> dict[str, Any]:
    """The profile of one forward and backward after two steps."""
    model.step(work)
    loss, shape = TokenLoss(model.model).train(), (1, work.max_length)
    ids = torch.randint(3, work.shapes.vocabulary, shape, device=model.device)
    positions = torch.arange(work.max_length, device=model.device)[None]
    with torch.profiler.profile(activities=activities) as profiler:
        (loss(ids, ids, positions) / ids.numel()).backward()
        torch.cuda.synchronize()
    kernels, spans = Counter[str](), list[tuple[float, float]]()
    for event in profiler.events() or []:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels[event.name] += event.time_range.elapsed_us()
            spans.append((event.time_range.start, event.time_range.end))
    busy = sum(end - start for start, end in spans)
    wall = max(1.0, max(end for _, end in spans) - min(start for start, _ in spans)) if spans else 1.0
    table = {name[:80]: microseconds for name, microseconds in kernels.most_common(25)}
    return {"kernels_us": table, "launches": len(spans), "busy": busy / wall, "right": busy / wall > 0.8}


ITEMS = {"peaks": peaks, "profile": profile}


def main() -> None:
    """Run the checks of one item."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("item", choices=ITEMS)
    item = parser.parse_args().item
    report = Report(f"gpu-memory-{item}" + (f"-{SETTING}" if item == "peaks" else ""))
    work = workload()
    ITEMS[item](report, RandomModel(work, CONFIGS[MODEL], "cuda"), work)
    report.save()


if __name__ == "__main__":
    main()
