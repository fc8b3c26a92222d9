"""Peak memory and longest sequences by GPU size: predicted by the planner, or with `--gpu` measured against it.

`python benchmarks/memory.py` writes results/memory.json, every entry marked predicted. `--gpu` builds random models of
real shapes, quantized layer by layer, takes training steps in each configuration and writes results/memory-gpu.json.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness import RESULTS, write

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.published_models import CONFIGS, work_of

from qlora.memory.planner.memory_plan import Budget, Plan, plan
from qlora.memory.planner.search import choose
from qlora.memory.planner.workload import Workload
from qlora.quant import Quant

GIB = 2**30
GPUS = (8, 12, 16, 24, 48, 80)  # GiB
HOST = 64 * GIB
RANK, LENGTH, CONTEXT_STEP, LONGEST = 16, 2048, 128, 2**21
SECONDS = 8.5 * 60  # of a call with --gpu


def peaks() -> list[dict[str, Any]]:
    """The planner's choice for sequences of LENGTH tokens on every GPU size, and its peak."""
    entries = []
    for name in CONFIGS:
        for gpu_gib in GPUS:
            best = choose(work_of(name, max_length=LENGTH), Budget(gpu_gib * GIB, HOST))
            entry = {"kind": "predicted", "model": name, "card_gib": gpu_gib, "fits": best.fits}
            entries.append(entry | {"peak_bytes": best.peak_bytes, "host_bytes": best.host_bytes, **choice(best.work)})
            print(entries[-1], flush=True)
    return entries


def choice(work: Workload) -> dict[str, int]:
    """Layers that recompute, offload activations and stream weights, and whether the embedding is in host memory."""
    layers = {"recomputed": work.recomputed, "parked": work.offloaded, "streamed": work.streamed}
    return layers | {"embedding_on_host": work.embedding_on_host}


def contexts() -> list[dict[str, Any]]:
    """The longest sequence that fits every GPU size: GPU memory only, and with HOST bytes for offloading."""
    entries = []
    for name in CONFIGS:
        work = work_of(name)
        for gpu_gib in GPUS:
            budget = Budget(gpu_gib * GIB, HOST)
            gpu_only = longest(lambda length, b=budget, w=work: plan(replace(w, max_length=length), b).fits)
            with_host = longest(lambda length, b=budget, w=work: any(fits_offloading(replace(w, max_length=length), b)))
            tokens = {"on_card_tokens": gpu_only, "with_host_tokens": max(gpu_only, with_host)}
            entries.append({"kind": "predicted", "model": name, "card_gib": gpu_gib, **tokens})
    return entries


def fits_offloading(work: Workload, budget: Budget) -> Iterator[bool]:
    """Whether it fits with all layers recomputed and offloaded, for every number of resident layers."""
    offloaded = replace(work, offload=work.shapes.layers - 1)
    yield plan(offloaded, budget).fits
    yield plan(replace(offloaded, host_embedding=True), budget).fits
    for resident in range(work.shapes.layers):
        yield plan(replace(offloaded, weights="stream", resident_layers=resident), budget).fits


def longest(fits: Callable[[int], bool]) -> int:
    """The largest multiple of CONTEXT_STEP that fits; 0 if none does."""
    low, high = 0, LONGEST // CONTEXT_STEP
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * CONTEXT_STEP) else (low, middle - 1)
    return low * CONTEXT_STEP


def configurations(work: Workload) -> Iterator[Workload]:
    """The configurations to measure; a host embedding and streaming last, since they move weights off the GPU."""
    layers = work.shapes.layers
    for length in (1024, 2048, 4096):
        for recompute, offload in ((layers, 0), (layers // 2, 0), (layers, layers - 1)):
            yield replace(work, max_length=length, recompute=recompute, offload=offload)
    if not work.shapes.tied:
        yield replace(work, max_length=LENGTH, recompute=layers, host_embedding=True)
    yield replace(work, max_length=4096, recompute=layers, weights="stream")


class RandomModel:
    """A random model, quantized on the device, that takes training steps as a Workload describes."""

    def __init__(self, work: Workload, config: dict[str, Any], device: str) -> None:
        import torch

        from qlora.adapters.inject import inject
        from qlora.adapters.lora import Lora

        self.device, self.streaming, self.host_embedding = torch.device(device), False, False
        self.model = random_base(config, self.device)
        inject(self.model, Lora(rank=work.adapters.rank, alpha=32, dropout=0.0), "all-linear", 0)
        with torch.no_grad():  # kernels are probed here, as in the base check of a run, not inside a recomputed layer
            self.model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=self.device))

    def step(self, work: Workload) -> int:
        """Peak bytes allocated in two training steps of `work`: the first one creates the optimizer state."""
        import torch

        from qlora.memory.copy_stream import CopyStream
        from qlora.memory.planner.search import UserChoices
        from qlora.memory.weight_streaming import WeightStreamer, embed_on_host
        from qlora.runs.memory_setup import MemoryFallback
        from qlora.training.loss import TokenLoss
        from qlora.training.optimizers import Adamw

        if work.weights == "stream" and not self.streaming:
            self.streaming = True
            WeightStreamer(self.model, work.resident_layers, CopyStream(self.device))
        if work.embedding_on_host and not self.host_embedding:
            self.host_embedding = True
            embed_on_host(self.model, self.device)
        MemoryFallback(self.model, work, UserChoices(), self.device)
        loss = TokenLoss(self.model).train()
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = Adamw.build([{"params": trainable, "lr": 1e-4}], (0.9, 0.999), 0.0)
        shape = (work.micro_batch, work.max_length)
        ids = torch.randint(3, work.shapes.vocabulary, shape, device=self.device)
        positions = torch.arange(work.max_length, device=self.device).expand(shape)
        reset_peak(self.device)
        for _ in range(2):
            (loss(ids, ids, positions) / ids.numel()).backward()
            optimizer.step()
            optimizer.zero_grad()
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0


def reset_peak(device: Any) -> None:
    """Release cached memory and count the peak from here."""
    import torch

    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def random_base(config: dict[str, Any], device: Any) -> Any:
    """A Llama or Qwen of random bfloat16 weights, created one matrix at a time; the decoder's linear layers in NF4."""
    import torch
    from transformers import AutoConfig

    from qlora.model.lean_attention import replace_attention
    from qlora.model.lean_modules import replace_with_lean
    from qlora.model.linear_layers import linear_paths
    from qlora.model.meta_model import build_meta_model
    from qlora.model.module_tree import set_by_path
    from qlora.quant import Quant, build_quantizer

    model = build_meta_model(AutoConfig.for_model(**config), torch.bfloat16, "auto", device)

    def noise(like: Any) -> Any:
        return torch.randn(like.shape, dtype=torch.bfloat16, device=device).mul_(0.02)

    for path in linear_paths(model):
        set_by_path(model, path, build_quantizer(Quant()).quantize(noise(model.get_submodule(path).weight), None))
    for name, value in list(model.named_parameters()):
        if value.is_meta:
            set_by_path(model, name, torch.nn.Parameter(noise(value), requires_grad=False))
    replace_with_lean(model)
    replace_attention(model)
    return model


def measure_on_gpu() -> None:
    """Measure every configuration that has no result yet, each limited to its planned peak, until the time is up."""
    import torch

    path = RESULTS / "memory-gpu.json"
    entries: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    done = {key(entry) for entry in entries}
    started, total = time.monotonic(), torch.cuda.mem_get_info()[1]
    for name, config in CONFIGS.items():
        work = replace(work_of(name, rank=RANK), optimizer="adamw", packing=False)
        missing = [variant for variant in configurations(work) if key(entry_of(variant)) not in done]
        model = None
        for variant in missing:
            if time.monotonic() - started > SECONDS:
                return
            torch.cuda.set_per_process_memory_fraction(1.0)
            model = model or RandomModel(work, config, "cuda")
            entries.append(entry_of(variant) | measured(model, plan(variant, Budget(total)), total))
            print(entries[-1], flush=True)
            write("memory-gpu", {"rows": entries})
        del model
        torch.cuda.empty_cache()


def measured(model: RandomModel, prediction: Plan, total: int) -> dict[str, Any]:
    """Planned and measured bytes, with GPU memory limited to the planned peak, as on a smaller GPU."""
    import torch

    torch.cuda.set_per_process_memory_fraction(min(1.0, prediction.peak_bytes / total))
    entry = {"kind": "measured", "planned_bytes": prediction.allocated_bytes, "cap_bytes": prediction.peak_bytes}
    try:
        return entry | {"allocated_bytes": model.step(prediction.work)}
    except torch.OutOfMemoryError as error:
        return entry | {"allocated_bytes": None, "error": str(error).splitlines()[0]}


def entry_of(work: Workload) -> dict[str, Any]:
    """What distinguishes a configuration from the others."""
    return {"model": work.shapes.name, "length": work.max_length, **choice(work)}


def key(entry: dict[str, Any]) -> tuple[Any, ...]:
    """The same values as a tuple, for lookup."""
    return tuple(entry[name] for name in ("model", "length", "recomputed", "parked", "streamed", "embedding_on_host"))


def main() -> None:
    """Predict, or measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", action="store_true", help="measure on this machine's GPU")
    if parser.parse_args().gpu:
        measure_on_gpu()
        return
    storage = Quant().model_dump(include={"kind", "double", "block"})
    settings = {"rank": RANK, "length": LENGTH, "host_bytes": HOST, "storage": storage}
    print(write("memory", {**settings, "peaks": peaks(), "contexts": contexts()}))


if __name__ == "__main__":
    main()
