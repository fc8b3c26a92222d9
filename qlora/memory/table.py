"""The plan in words: a table for people, and half a line for a run's start."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qlora.memory.plan import Plan

GIB = 2**30
DISK = {"base": "the base's files", "kept_base": "kept in 4 bits", "run": "a run's folder", "merged": "a merged model"}
COMPARED = {
    "full_finetune_bytes": "full fine-tuning",
    "lora_16bit_bytes": "16-bit LoRA",
    "qlora_bytes": "QLoRA with all layers recomputed",
}


def table(plan: "Plan") -> str:
    """The plan for people: owners by size, the phases, the choice, and what other ways of training would need."""
    found = plan.as_json()
    choice = found["choice"]
    owners = sorted(found["owners"].items(), key=lambda item: -item[1])
    lines = [
        f"{found['model']}: {found['parameters']:,} parameters, {found['trainable_parameters']:,} of them trainable",
        *(f"  {name.replace('_', ' '):26}{gib(size)}" for name, size in owners if size),
        f"  {'peak, ' + found['peak_phase']:26}{gib(found['peak_bytes'])}  of {gib(found['gpu_bytes']).strip()}",
        "  phases: " + ", ".join(f"{name} {gib(size).strip()}" for name, size in found["phases"].items()),
        f"  {'main memory':26}{gib(found['host_bytes'])}",
        f"  {'a merged export':26}{gib(found['export_bytes'])}",
        "  disk: " + ", ".join(f"{DISK[name]} {gib(size).strip()}" for name, size in found["disk"].items()),
        f"{in_words(plan)}, micro-batch {choice['micro_batch']}",
        "for comparison: "
        + ", ".join(f"{words} {gib(found['compare'][key]).strip()}" for key, words in COMPARED.items()),
        "fits (predicted)" if found["fits"] else f"does not fit: {found['advice']}",
    ]
    return "\n".join(lines)


def in_words(plan: "Plan") -> str:
    """How it runs, in half a line: `recompute 20 layers of 32, 29 park in main memory, weights resident`."""
    work, layers = plan.work, plan.work.shapes.layers
    parked = f", {work.parked} park in main memory" if work.parked else ""
    weights = f"{work.streamed} layers stream from main memory" if work.streamed else "weights resident"
    embedding = ", the embedding in main memory" if work.embeds_on_host else ""
    embedding += f", the base shared by {work.processes} processes" if work.sharded else ""
    return f"{work.recomputed} of {layers} layers recompute{parked}, {weights}{embedding}"


def gib(size: int) -> str:
    """Bytes in GiB, small ones in MiB, set for a column."""
    return f"{size / GIB:8.2f} GiB" if size >= GIB // 10 else f"{size / 2**20:8.2f} MiB"
