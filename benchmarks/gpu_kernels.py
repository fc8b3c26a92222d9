"""Kernels on a GPU: right against float64 or torch's own, and chosen or not; speed of dequantization and copies.

`python benchmarks/gpu_kernels.py right|rates` writes results/gpu-kernels-NAME.json.
"""

import argparse
import time
from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import torch
from gpu_report import Report

from qlora.model import varlen_attention
from qlora.model.kernels import gated_product, rms_norm, rotary_pair
from qlora.model.kernels.rms_norm import NormForm
from qlora.quant.bitsandbytes_ops import dequantize_unfused
from qlora.quant.cuda_dequantize import Spec, dequantize_fused, fastest, random_matrix
from qlora.utils.kernel_notes import take_kernel_notes


class Sizes(NamedTuple):
    """Widths of norms, of a gated product, and heads of query and key with the size of one."""

    widths: tuple[int, ...]
    intermediate: int
    heads: tuple[int, int, int]


LARGE = Sizes((2048, 4096, 8192), 14336, (32, 8, 128))  # of models with 1B to 70B parameters
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_SIZES = (64, 128, 256)
MATRICES = {"8B query": (4096, 4096), "8B up": (14336, 4096), "70B up": (28672, 8192)}
BYTES_PER_WEIGHT = 0.5 + 1 / 64 + 2  # codes and absmax codes read, bfloat16 written
COPY_BYTES = 2**28


def right(report: Report, device: torch.device) -> None:
    """Item 2: attention against float64, the fused kernels against torch's operators, dequantization bit for bit."""
    for dtype, head in product(DTYPES[:2], HEAD_SIZES):
        report.check(f"variable-length attention, {dtype}, {head} per head",
                     lambda d=dtype, h=head: _noted(varlen_attention.works(device, d, h)))  # fmt: skip
    for dtype, (name, chosen) in product(DTYPES, choices(device).items()):
        report.check(f"{name}, {dtype}", lambda c=chosen, d=dtype: _chosen(c(d)))
    for kind, double, dtype in product(("nf4", "fp4"), (True, False), DTYPES):
        report.check(f"dequantization, {kind}{', double' * double}, {dtype}",
                     lambda k=kind, b=double, d=dtype: same_bits(device, k, b, d))  # fmt: skip


def choices(device: torch.device, sizes: Sizes = LARGE) -> dict[str, Callable[[torch.dtype], bool]]:
    """Whether a kernel is chosen for a dtype, by name."""
    form = NormForm(1e-5, rms_norm.ROUND_FIRST)
    norms = {
        f"RMSNorm of {width}": lambda dtype, w=width: rms_norm._is_chosen(device, dtype, w, form)
        for width in sizes.widths
    }
    products = {
        f"gated product {act}": lambda dtype, a=act: gated_product._is_chosen(device, dtype, sizes.intermediate, a)
        for act in range(3)
    }
    return {**norms, **products, "rotary": lambda dtype: rotary_pair._is_chosen(device, dtype, sizes.heads)}


def _noted(works: bool) -> dict[str, Any]:
    return {"right": works, "notes": take_kernel_notes()}


def _chosen(chosen: bool) -> dict[str, Any]:
    """A kernel that is right, but slower than torch's operators, is no fault."""
    notes = take_kernel_notes()
    return {"chosen": chosen, "notes": notes, "right": chosen or any("not faster" in note for note in notes)}


def same_bits(device: torch.device, kind: str, double: bool, dtype: torch.dtype) -> dict[str, Any]:
    """The fused dequantization against bitsandbytes'."""
    shape, spec = (4096, 4096), Spec(kind, 64, dtype)
    stored = random_matrix(shape, 64, device, 4 if double else 2)
    equal = torch.equal(dequantize_fused(stored, shape, spec), dequantize_unfused(stored, shape, spec))
    return {"right": equal}


def rates(report: Report, device: torch.device) -> None:
    """Items 6 and 7: GB/s of both dequantizations, which one is chosen, and GB/s of copies from pinned memory."""
    for (name, shape), kind in product(MATRICES.items(), ("nf4", "fp4")):
        report.check(f"dequantize {name}, {kind}", lambda s=shape, k=kind: dequantization(device, s, k))
    for direction in ("to the GPU", "to the host"):
        report.check(f"copy {direction}", lambda d=direction: copies(device, d))


def dequantization(device: torch.device, shape: tuple[int, int], kind: str) -> dict[str, Any]:
    """GB/s of ours and theirs; right if the faster one is chosen (or they are within 5 %)."""
    spec, stored = Spec(kind, 64, torch.bfloat16), random_matrix(shape, 64, device)[:4]
    kernels: dict[str, Any] = {"ours": dequantize_fused, "theirs": dequantize_unfused}
    seconds = {name: seconds_of(lambda k=kernel: k(stored, shape, spec)) for name, kernel in kernels.items()}
    chosen = "ours" if fastest(stored, spec, dequantize_unfused) is dequantize_fused else "theirs"
    moved = BYTES_PER_WEIGHT * shape[0] * shape[1]
    speeds = {f"{name}_gb_per_second": moved / value / 1e9 for name, value in seconds.items()}
    return {"chosen": chosen, **speeds, "right": seconds[chosen] <= 1.05 * min(seconds.values())}


def copies(device: torch.device, direction: str) -> dict[str, Any]:
    """GB/s of a copy of COPY_BYTES; right above 2 GB/s, which an old PCIe slot gives."""
    host = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    gpu = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target, source = (gpu, host) if direction == "to the GPU" else (host, gpu)
    rate = COPY_BYTES / seconds_of(lambda: target.copy_(source, non_blocking=True)) / 1e9
    return {"gb_per_second": rate, "right": rate > 2}


def seconds_of(run: Callable[[], object], count: int = 20) -> float:
    """Seconds of one call, the mean of `count`."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(count):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / count


ITEMS = {"right": right, "rates": rates}


def main() -> None:
    """Run the checks of one item."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("item", choices=ITEMS)
    item = parser.parse_args().item
    report = Report(f"gpu-kernels-{item}")
    ITEMS[item](report, torch.device("cuda"))
    report.save()


if __name__ == "__main__":
    main()
