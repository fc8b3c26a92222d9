"""Memory outside of tensors: CUDA context, libraries, and what allocators leave unused."""

from qlora.memory.planner.activations import backward_bytes, recompute_bytes
from qlora.memory.planner.cost_model import boundary_bytes
from qlora.memory.planner.workload import Workload

UNTRACKED = ("device_context", "runtime", "fragmentation_reserve")  # components that torch's allocator does not count

CONTEXT_BYTES = 600_000_000  # a CUDA context with its modules and cuBLAS workspaces: 0.4 to 0.7 GB
NCCL_BYTES = 300_000_000  # NCCL's buffers: 0.2 to 0.5 GB
RUNTIME_BYTES = 520 * 2**20  # all libraries, and a step of almost no work: 497 MiB measured on Linux
# Of the transient components. CUDA: 2 to 4 % with expandable segments. CPU: glibc's heap, which memory/malloc.py keeps;
# its aligned allocations seldom fit into what was just freed. Fitted to benchmarks/results/cpu_peaks.json.
FRAGMENTATION = {"cuda": 0.04, "cpu": 0.6}
CPU_EXPERT_FRAGMENTATION = 0.22  # the small tensors of single experts fill what larger ones leave
CPU_RECOMPUTE_FRAGMENTATION = 2.1  # of the bytes of a recompute: boundaries remain between the freed tensors


def overhead(work: Workload, transient: int) -> dict[str, int]:
    """The components outside of tensors, when so many bytes of tensors are transient."""
    cuda = work.device == "cuda"
    return {
        "device_context": (CONTEXT_BYTES + (NCCL_BYTES if work.processes > 1 else 0)) if cuda else 0,
        "runtime": 0 if cuda else RUNTIME_BYTES,
        "fragmentation_reserve": int(_unused(work) * transient) + bool(transient) * _recompute_holes(work),
    }


def _unused(work: Workload) -> float:
    """What an allocator leaves unused, as a share of the transient bytes."""
    experts = any(layer.experts for layer in work.shapes.kinds)
    return CPU_EXPERT_FRAGMENTATION if experts and work.device == "cpu" else FRAGMENTATION[work.device]


def _recompute_holes(work: Workload) -> int:
    """What recomputing leaves unused in a CPU's heap."""
    if work.device == "cuda" or not work.recomputed:
        return 0
    kinds = work.shapes.kinds_in(range(work.recomputed))
    size = max(recompute_bytes(work, layer) + backward_bytes(work, layer) for layer, _ in kinds)
    size += work.recomputed * boundary_bytes(work)
    return int(CPU_RECOMPUTE_FRAGMENTATION * size)
