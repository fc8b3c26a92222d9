"""Peaks and largest contexts by card: predicted by the planner, and with `--gpu` measured against it on a card.

`python memory.py` writes results/memory.json, every row marked predicted. `--gpu` builds random models of true shapes,
quantised layer by layer, takes a training step in each configuration and writes results/memory-gpu.json as it goes.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench import RESULTS, write

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.published_models import CONFIGS, work_of

from qlora.memory.planner.memory_plan import Budget, Plan, plan
from qlora.memory.planner.search import choose
from qlora.memory.planner.workload import Workload

GIB = 2**30
CARDS = (8, 12, 16, 24, 48, 80)  # GiB
HOST = 64 * GIB
RANK, LENGTH, CONTEXT_STEP, LONGEST = 16, 2048, 128, 2**21
SECONDS = 8.5 * 60  # of a call with --gpu


def peaks() -> list[dict[str, Any]]:
    """What the planner chooses for rows of LENGTH tokens on every card, and what that takes."""
    rows = []
    for name in CONFIGS:
        for card in CARDS:
            found = choose(work_of(name, max_length=LENGTH), Budget(card * GIB, HOST))
            row = {"kind": "predicted", "model": name, "card_gib": card, "fits": found.fits}
            rows.append(row | {"peak_bytes": found.peak_bytes, "host_bytes": found.host_bytes, **chosen(found.work)})
            print(rows[-1], flush=True)
    return rows


def chosen(work: Workload) -> dict[str, int]:
    """Layers that recompute, park and stream, and whether the embedding waits in main memory."""
    away = work.embeds_on_host
    return {"recomputed": work.recomputed, "parked": work.parked, "streamed": work.streamed, "embedding_on_host": away}


def contexts() -> list[dict[str, Any]]:
    """The longest row that trains on every card: with nothing but the card, and with HOST bytes of main memory."""
    rows = []
    for name in CONFIGS:
        work = work_of(name)
        for card in CARDS:
            budget = Budget(card * GIB, HOST)
            on_card = longest(lambda length, b=budget, w=work: plan(replace(w, max_length=length), b).fits)
            helped = longest(lambda length, b=budget, w=work: any(fit(replace(w, max_length=length), b)))
            found = {"on_card_tokens": on_card, "with_host_tokens": max(on_card, helped)}
            rows.append({"kind": "predicted", "model": name, "card_gib": card, **found})
    return rows


def fit(work: Workload, budget: Budget) -> Iterator[bool]:
    """Whether it fits with all layers recomputed and parked, for every number of resident layers."""
    parked = replace(work, offloaded=work.shapes.layers - 1)
    yield plan(parked, budget).fits
    yield plan(replace(parked, gathers=True), budget).fits
    for resident in range(work.shapes.layers):
        yield plan(replace(parked, weights="stream", resident_layers=resident), budget).fits


def longest(fits: Callable[[int], bool]) -> int:
    """The largest multiple of CONTEXT_STEP that fits; 0 if none does."""
    low, high = 0, LONGEST // CONTEXT_STEP
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * CONTEXT_STEP) else (low, middle - 1)
    return low * CONTEXT_STEP


def configurations(work: Workload) -> Iterator[Workload]:
    """What is measured of a model, gathering and streaming last: embedding and layers leave the card for them."""
    layers = work.shapes.layers
    for length in (1024, 2048, 4096):
        for recompute, offloaded in ((layers, 0), (layers // 2, 0), (layers, layers - 1)):
            yield replace(work, max_length=length, recompute=recompute, offloaded=offloaded)
    if not work.shapes.tied:
        yield replace(work, max_length=LENGTH, recompute=layers, gathers=True)
    yield replace(work, max_length=4096, recompute=layers, weights="stream")


class Rig:
    """A random model of some shape, quantised on the device, that takes training steps as a Work says."""

    def __init__(self, work: Workload, config: dict[str, Any], device: str) -> None:
        import torch

        from qlora.adapters.inject import inject
        from qlora.adapters.lora import Lora

        self.device, self.streaming, self.gathering = torch.device(device), False, False
        self.model = random_base(config, self.device)
        inject(self.model, Lora(rank=work.adapters.rank, alpha=32, dropout=0.0), "all-linear", 0)

    def step(self, work: Workload) -> int:
        """Peak bytes allocated in two training steps as `work` says: the first makes the moments."""
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
        if work.embeds_on_host and not self.gathering:
            self.gathering = True
            embed_on_host(self.model, self.device)
        MemoryFallback(self.model, work, UserChoices(), self.device)
        loss = TokenLoss(self.model).train()
        trained = [each for each in self.model.parameters() if each.requires_grad]
        optimizer = Adamw.build([{"params": trained, "lr": 1e-4}], (0.9, 0.999), 0.0)
        shape = (work.micro_batch, work.max_length)
        ids = torch.randint(3, work.shapes.vocabulary, shape, device=self.device)
        positions = torch.arange(work.max_length, device=self.device).expand(shape)
        forget_peak(self.device)
        for _ in range(2):
            (loss(ids, ids, positions) / ids.numel()).backward()
            optimizer.step()
            optimizer.zero_grad()
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0


def forget_peak(device: Any) -> None:
    """Give cached memory back and count the peak from here."""
    import torch

    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def random_base(config: dict[str, Any], device: Any) -> Any:
    """A Llama or Qwen of random bfloat16 weights, one matrix at a time, its decoder's linear layers in NF4."""
    import torch
    from transformers import AutoConfig

    from qlora.model.lean_modules import lean
    from qlora.model.meta_model import build, linear_paths
    from qlora.model.module_tree import put
    from qlora.quant.nf4 import Nf4

    model = build(AutoConfig.for_model(**config), torch.bfloat16, "auto", device)

    def noise(like: Any) -> Any:
        return torch.randn(like.shape, dtype=torch.bfloat16, device=device).mul_(0.02)

    for path in linear_paths(model):
        put(model, path, Nf4().quantize(noise(model.get_submodule(path).weight), None))
    for name, value in list(model.named_parameters()):
        if value.is_meta:
            put(model, name, torch.nn.Parameter(noise(value), requires_grad=False))
    lean(model)
    return model


def measure_on_gpu() -> None:
    """Every configuration that has no row yet, each under the cap of its own plan, until the time is up."""
    import torch

    path = RESULTS / "memory-gpu.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    done = {key(row) for row in rows}
    started, total = time.monotonic(), torch.cuda.mem_get_info()[1]
    for name, config in CONFIGS.items():
        work = replace(work_of(name, rank=RANK), optimizer="adamw", packing=False)
        left = [each for each in configurations(work) if key(row_of(each)) not in done]
        rig = None
        for each in left:
            if time.monotonic() - started > SECONDS:
                return
            torch.cuda.set_per_process_memory_fraction(1.0)
            rig = rig or Rig(work, config, "cuda")
            found = plan(each, Budget(total))
            rows.append(row_of(each) | measured(rig, found, total))
            print(rows[-1], flush=True)
            write("memory-gpu", {"rows": rows})
        del rig
        torch.cuda.empty_cache()


def measured(rig: Rig, found: Plan, total: int) -> dict[str, Any]:
    """Planned and measured bytes; under a cap of the plan's whole peak, which is what a smaller card would have."""
    import torch

    torch.cuda.set_per_process_memory_fraction(min(1.0, found.peak_bytes / total))
    row = {"kind": "measured", "planned_bytes": found.allocated_bytes, "cap_bytes": found.peak_bytes}
    try:
        return row | {"allocated_bytes": rig.step(found.work)}
    except torch.OutOfMemoryError as error:
        return row | {"allocated_bytes": None, "error": str(error).splitlines()[0]}


def row_of(work: Workload) -> dict[str, Any]:
    """What tells a configuration from another."""
    return {"model": work.shapes.name, "length": work.max_length, **chosen(work)}


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """The same, to be looked up."""
    return tuple(row[name] for name in ("model", "length", "recomputed", "parked", "streamed", "embedding_on_host"))


def main() -> None:
    """Predict, or measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", action="store_true", help="measure on the card that is here")
    if parser.parse_args().gpu:
        measure_on_gpu()
        return
    said = {"rank": RANK, "length": LENGTH, "host_bytes": HOST, "storage": asdict(work_of("Llama-2-7B").storage)}
    print(write("memory", {**said, "peaks": peaks(), "contexts": contexts()}))


if __name__ == "__main__":
    main()
