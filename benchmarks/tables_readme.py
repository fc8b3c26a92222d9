"""The README's tables of measurements, drawn from results/*.json: python benchmarks/tables_readme.py."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fault_table

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
SPEEDS = ("speed", "speed-short", "gpu-speed-2048", "gpu-speed-4096", "gpu-speed-24gb")
CONTENDERS = {  # key in the results -> name in the table
    "ours": "qlora",
    "ours, all layers recomputed": "qlora, all layers recomputed",
    "ours, compiled": "qlora, compiled",
    "B1 TRL": "TRL, its defaults",
    "B0 PEFT": "PEFT, as in the QLoRA authors' scripts",
}
PREFERENCE_CONTENDERS = {
    "ours": "qlora",
    "ours, one pair a micro-batch": "qlora, one pair a micro-batch",
    "ours, all layers recomputed": "qlora, all layers recomputed",
    "TRL DPO": "TRL, its defaults",
    "TRL DPO, one pair a micro-batch": "TRL, one pair a micro-batch",
}
COMPONENTS = {  # key in the results -> name in the table, where it is not the key itself
    "packed_base": "quantized base",
    "head": "LM head",
    "boundaries": "layer inputs",
    "dequantisation_buffer": "dequantization buffer",
    "gathered": "all-gathered layers",
}


def read(name: str) -> dict[str, Any] | None:
    """One results file; None if it was not measured yet."""
    path = HERE / "results" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def speed_table() -> str:
    """Tokens per second and peak memory of every contender, and their ratios to TRL's."""
    lines: list[str] = []
    for name in SPEEDS:
        result = read(name)
        if result is not None:
            lines += ["", heading(result), "", *contender_rows(result["contenders"])]
    return "\n".join(lines) + "\n"


def heading(result: dict[str, Any]) -> str:
    """The workload, hardware and library versions of a race, in a sentence."""
    work, machine = result["workload"], result["machine"]
    hardware = f"{machine['cores']} cores of an {machine['cpu']}" if work["device"] == "cpu" else machine["card"]
    kind = "short sequences (median 100 tokens), at most" if work["short"] else "sequences of"
    return (
        f"A random {work['shape']} Llama, rank {work['rank']}, {work['batch']} {kind} {work['length']} tokens a step, "
        f"{hardware}; trl {machine['trl']}, peft {machine['peft']}, bitsandbytes {machine['bitsandbytes']}:"
    )


def contender_rows(results: dict[str, Any]) -> list[str]:
    """A row for each contender; ratios to TRL's defaults."""
    trl = results.get("B1 TRL")
    rows = [
        "| | tokens/s | against TRL | peak memory | against TRL | of matmul-only speed |",
        "|---|---|---|---|---|---|",
    ]
    for key, result in results.items():
        speed = f"{result['tokens_per_second'] / trl['tokens_per_second']:.2f}x" if trl else ""
        memory = f"{result['peak_bytes'] / trl['peak_bytes']:.2f}x" if trl else ""
        rows.append(
            f"| {CONTENDERS[key]} | {result['tokens_per_second']:,.0f} | {speed} "
            f"| {result['peak_bytes'] / 2**20:,.0f} MiB | {memory} | {100 * result['share_of_matmul_limit']:.0f} % |"
        )
    return rows


def memory_table() -> str:
    """Longest sequences, and the plan for the benchmark's length, by model and GPU size: all predicted."""
    result = read("memory")
    if result is None:
        return "\n"
    contexts = rows_by_model(result["contexts"], lambda row: f"{row['on_card_tokens']:,} / {row['with_host_tokens']:,}")
    sizes = sorted({entry["card_gib"] for entry in result["contexts"]})
    head = ["| predicted | " + " | ".join(f"{size} GiB" for size in sizes) + " |", "|---" * (len(sizes) + 1) + "|"]
    lines = [
        "Longest sequence in tokens that fits with full activation checkpointing: GPU memory only / with "
        f"{result['host_bytes'] / 2**30:.0f} GiB of host memory for offloading:",
        "",
        *head,
        *contexts,
        "",
        f"Plan for sequences of {result['length']:,} tokens: peak, then layers that recompute / offload activations / "
        "stream weights (e: the embedding is in host memory, too):",
        "",
    ]
    return "\n".join([*lines, *head, *rows_by_model(result["peaks"], plan_cell), *cpu_peaks()]) + "\n"


def cpu_peaks() -> list[str]:
    """Planned and measured peaks of runs on a CPU."""
    result = read("cpu_peaks")
    if result is None:
        return []
    errors = [abs(run["planned_bytes"] / run["peak_bytes"] - 1) for run in result["runs"]]
    lines = [
        "",
        "Measured on a CPU, whole runs of random models: Llamas, a mixture of experts, a hybrid (Gated DeltaNet); "
        f"the plan's error is {100 * statistics.median(errors):.1f} % "
        f"(median), {100 * max(errors):.1f} % at most:",
        "",
        "| base model | micro-batch | layers recomputed | planned | measured |",
        "|---|---|---|---|---|",
    ]
    for run in result["runs"]:
        sizes = " | ".join(f"{run[name] / 2**20:,.0f} MiB" for name in ("planned_bytes", "peak_bytes"))
        lines.append(f"| {run['size']} | {run['rows']} x {run['length']} | {run['recompute']} | {sizes} |")
    return lines


def rows_by_model(entries: list[dict[str, Any]], cell: Callable[[dict[str, Any]], str]) -> list[str]:
    """A row for each model, a cell for each GPU size."""
    models = list(dict.fromkeys(entry["model"] for entry in entries))
    return [
        f"| {model} | " + " | ".join(cell(entry) for entry in entries if entry["model"] == model) + " |"
        for model in models
    ]


def plan_cell(entry: dict[str, Any]) -> str:
    """The peak and how it is reached."""
    if not entry["fits"]:
        return "no"
    layers = f"{entry['recomputed']} / {entry['parked']} / {entry['streamed']}"
    return f"{entry['peak_bytes'] / 2**30:.1f} GiB: {layers}{' e' * entry['embedding_on_host']}"


def faults_table() -> str:
    """The results of `make faults`, as far as it has run."""
    result = read("faults")
    return fault_table.table(result["parts"]) if result else ""


def gpus_table() -> str:
    """The memory of one of two GPUs that train a model together, by component: predicted, in GiB."""
    result = read("many_cards")
    if result is None:
        return ""
    plans, gib = result["plans"], 2**30
    lines = [
        f"[{Path(result['recipe']).stem}]({result['recipe']}), {result['ram']} of host memory; "
        f"`distributed.kind: auto` chooses {result['auto']}:",
        "",
        f"| one of two GPUs with {result['card']}, predicted | " + " | ".join(plans) + " |",
        "|---" * (len(plans) + 1) + "|",
    ]
    first = next(iter(plans.values()))
    for key in (key for key in first["owners"] if any(plan["owners"][key] for plan in plans.values())):
        sizes = " | ".join(f"{plan['owners'][key] / gib:.2f} GiB" for plan in plans.values())
        lines.append(f"| {COMPONENTS.get(key, key.replace('_', ' '))} | {sizes} |")
    for label, key in (("peak", "peak_bytes"), ("host memory of its process", "host_bytes")):
        lines.append(f"| {label} | " + " | ".join(f"{plan[key] / gib:.2f} GiB" for plan in plans.values()) + " |")
    lines += [
        f"| {label} | " + " | ".join(str(plan["choice"][key]) for plan in plans.values()) + " |"
        for label, key in (
            ("layers that recompute", "recompute"),
            ("layers that offload activations", "offloaded_layers"),
            ("layers whose weights stay on the GPU", "resident_layers"),
        )
    ]
    return "\n".join(lines) + "\n"


def trees_table() -> str:
    """Tokens and seconds of multi-turn reasoning data, as prefix trees and answer by answer."""
    result = read("prefix_trees")
    if result is None:
        return ""
    lines = [
        f"| {result['conversations']} conversations of {result['turns']} turns, thoughts of the past stripped | "
        "tokens, answer by answer | as prefix trees | | step time |",
        "|---|---|---|---|---|",
    ]
    for name, entry in result["sets"].items():
        words = entry["median_words"]
        lines.append(
            f"| {name}: medians of {words['question']}, {words['thought']} and {words['answer']} words | "
            f"{entry['tokens_separate']:,} | {entry['tokens_trees']:,} | {entry['share']:.0%} | "
            f"{1 / entry['trees_are_faster_by']:.0%} |"
        )
    return "\n".join(lines) + "\n"


def preferences_table() -> str:
    """Tokens per second and peak memory of DPO, and their ratios to TRL's DPOTrainer with its defaults."""
    result = read("preferences")
    if result is None:
        return ""
    work, machine, trl = result["workload"], result["machine"], result["contenders"]["TRL DPO"]
    lines = [
        f"DPO on a random {work['shape']} Llama in NF4, {work['dtype']} compute, rank {work['rank']}, {work['batch']} "
        f"pairs a step with prompts of {work['prompt']} and answers of {work['answer']} tokens, {machine['cores']} "
        f"cores of an {machine['cpu']}{_load_note(result)}; trl {machine['trl']}. A pair counts as its prompt and both "
        "answers, once:",
        "",
        "| | tokens/s | against TRL | peak memory | against TRL |",
        "|---|---|---|---|---|",
    ]
    for key, entry in result["contenders"].items():
        speed = entry["tokens_per_second"] / trl["tokens_per_second"]
        lines.append(
            f"| {PREFERENCE_CONTENDERS[key]} | {entry['tokens_per_second']:,.1f} | {speed:.2f}x "
            f"| {entry['peak_bytes'] / 2**20:,.0f} MiB | {entry['peak_bytes'] / trl['peak_bytes']:.2f}x |"
        )
    return "\n".join(lines) + "\n"


def _load_note(result: dict[str, Any]) -> str:
    """That other programs ran beside a race, where they did."""
    load = result["load_average"]
    busy = load["before"] > load["cores"]
    return f", busy with other work (load average {load['before']:.0f})" if busy else ""


def data_scale_table() -> str:
    """Seconds and memory of data preparation by the number of records, beside TRL."""
    result = read("data_scale")
    if result is None:
        return ""
    machine, processes = result["machine"], result["processes"]
    lines = [
        f"Conversations of about 50 tokens to packed rows of 2,048, {processes} processes on {machine['cores']} cores "
        f"of an {machine['cpu']}; trl {machine['trl']}. Memory: above that of the imports:",
        "",
        "| conversations | qlora | TRL | faster by | memory | TRL's | second start |",
        "|---|---|---|---|---|---|---|",
    ]
    for rows, entry in result["sizes"].items():
        own, other = entry[f"ours, {processes} processes"], entry.get(f"TRL, {processes} processes")
        seconds, memory = (f"{other['seconds']:,.0f} s", _mib(other)) if other else ("", "")
        ratio = f"{other['seconds'] / own['seconds']:.2f}x" if other else ""
        lines.append(
            f"| {int(rows):,} | {own['seconds']:,.0f} s | {seconds} | {ratio} | {_mib(own)} | {memory} "
            f"| {entry['second_start']['seconds']:.1f} s |"
        )
    return "\n".join(lines) + "\n"


def _mib(entry: dict[str, Any]) -> str:
    return f"{entry['peak_bytes'] / 2**20:,.0f} MiB"


def generation_table() -> str:
    """Tokens per second of generation, each contender beside qlora one by one."""
    result = read("generation")
    if result is None:
        return "\n"
    work, machine = result["workload"], result["machine"]
    alone = result["contenders"]["qlora, one by one"]["tokens_per_second"]
    rounds = len(result["contenders"]["qlora, one by one"]["seconds"])
    lines = [
        f"{len(work['prompts'])} prompts of {min(work['prompts'])} to {max(work['prompts'])} tokens, "
        f"{work['tokens']} new tokens "
        f"each, a random {work['shape']} Llama in NF4, float32 products, one thread of an {machine['cpu']}; "
        f"transformers {machine['transformers']}, bitsandbytes {machine['bitsandbytes']}; "
        f"{rounds} round{'s' * (rounds > 1)}{' on a busy machine' * (machine['load_before'] > machine['cores'])}. On a "
        "CPU `qlora generate`, `eval` and `chat` keep up to 256 MiB of dequantized weights:",
        "",
        "| | tokens per processor second | against one by one |",
        "|---|---|---|",
    ]
    for name, values in result["contenders"].items():
        rate = values["tokens_per_second"]
        lines.append(f"| {name} | {rate:.2f} | {rate / alone:.2f}x |")
    return "\n".join(lines) + "\n"


CLIENTS = {"vllm": "vLLM", "mlx": "mlx-lm", "transformers": "transformers", "cyllama": "llama.cpp by"}
EXPORTS = {
    "merged": "`--to merged`", "portable": "base + `--to portable`", "adapter": "base + `--to adapter`",
    "mlx": "base + `--to mlx`",
    "gguf float16": "`--to gguf`",
    "gguf float32": "`--to gguf --dtype float32`",
}  # fmt: skip


def clients_table() -> str:
    """Greedy answers and prompt ids of exports in other programs, summed over the models."""
    result = read("clients")
    if result is None:
        return ""
    lines = [
        "| program | date | export | models | same answers | same prompt ids |",
        "|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for line in result["lines"]:
        groups.setdefault((line["client"], line["version"], line["export"]), []).append(line)
    for (client, version, export), group in groups.items():
        answers, total = (sum(line[key] for line in group) for key in ("answers", "of"))
        chats = [line for line in group if "prompts" in line]
        prompts = f"{sum(line['prompts'] for line in chats)} of {sum(line['of'] for line in chats)}" if chats else ""
        models, day = ", ".join(line["model"] for line in group), max(line["date"] for line in group)
        name, kind = CLIENTS.get(client, client), EXPORTS.get(export, export)
        lines.append(f"| {name} {version} | {day} | {kind} | {models} | {answers} of {total} | {prompts} |")
    return "\n".join(lines) + "\n"


TABLES: dict[str, Callable[[], str]] = {
    "data_scale": data_scale_table,
    "generation": generation_table,
    "speed": speed_table,
    "memory": memory_table,
    "faults": faults_table,
    "gpus": gpus_table,
    "trees": trees_table,
    "clients": clients_table,
    "preferences": preferences_table,
}


def redraw(text: str) -> str:
    """`text` with every table between its markers redrawn."""
    for name, table in TABLES.items():
        before, begin, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        if begin and end:
            text = before + begin + table() + end + after
    return text


if __name__ == "__main__":
    README.write_text(redraw(README.read_text(encoding="utf-8")), encoding="utf-8")
