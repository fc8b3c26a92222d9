"""The README's tables of figures, drawn from results/*.json: python benchmarks/tables.py. None is typed by hand."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fault_table

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
SPEEDS = ("speed", "speed-short", "gpu-speed-2048", "gpu-speed-4096", "gpu-speed-24gb")


def read(name: str) -> dict[str, Any] | None:
    """One results file, None before it was measured."""
    path = HERE / "results" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def speed_table() -> str:
    """Tokens per second and peak memory of every contender, beside TRL's."""
    lines: list[str] = []
    for name in SPEEDS:
        found = read(name)
        if found is not None:
            lines += ["", heading(found), "", *contenders(found["contenders"])]
    return "\n".join(lines) + "\n"


def heading(found: dict[str, Any]) -> str:
    """What was raced, in a sentence."""
    work, machine = found["workload"], found["machine"]
    where = f"{machine['cores']} cores of an {machine['cpu']}" if work["device"] == "cpu" else machine["card"]
    kind = "short rows (median 100 tokens), at most" if work["short"] else "rows of"
    return (
        f"A random {work['shape']} Llama, rank {work['rank']}, {work['batch']} {kind} {work['length']} tokens a step, "
        f"{where}; trl {machine['trl']}, peft {machine['peft']}, bitsandbytes {machine['bitsandbytes']}:"
    )


def contenders(found: dict[str, Any]) -> list[str]:
    """A row for each contender; ratios to TRL's defaults."""
    theirs = found.get("B1 TRL")
    rows = [
        "| | tokens/s | against TRL | peak memory | against TRL | of the matmuls' own speed |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        faster = f"{one['tokens_per_second'] / theirs['tokens_per_second']:.2f}x" if theirs else ""
        smaller = f"{one['peak_bytes'] / theirs['peak_bytes']:.2f}x" if theirs else ""
        rows.append(
            f"| {name} | {one['tokens_per_second']:,.0f} | {faster} | {one['peak_bytes'] / 2**20:,.0f} MiB | {smaller} "
            f"| {100 * one['share_of_matmul_limit']:.0f} % |"
        )
    return rows


def memory_table() -> str:
    """Largest contexts and what is chosen at the benchmark's length, by model and card: all predicted."""
    found = read("memory")
    if found is None:
        return "\n"
    cards = sorted({row["card_gib"] for row in found["contexts"]})
    head = ["| predicted | " + " | ".join(f"{card} GiB" for card in cards) + " |", "|---" * (len(cards) + 1) + "|"]
    host = f"{found['host_bytes'] / 2**30:.0f} GiB of main memory"
    lines = [
        f"Longest row in tokens on the card alone, all layers recomputed; after the stroke with {host}:",
        "",
        *head,
    ]
    lines += by_card(found["contexts"], lambda row: f"{row['on_card_tokens']:,} / {row['with_host_tokens']:,}")
    chosen = "layers recomputed / parked / streamed (e: the embedding, too, waits in main memory)"
    lines += ["", f"What is chosen for rows of {found['length']:,} tokens: {chosen}:", ""]
    return "\n".join([*lines, *head, *by_card(found["peaks"], choice), *on_cpu()]) + "\n"


def on_cpu() -> list[str]:
    """Planned and measured peaks of runs on a CPU."""
    found = read("cpu_peaks")
    if found is None:
        return []
    off = [abs(run["planned_bytes"] / run["peak_bytes"] - 1) for run in found["runs"]]
    lines = [
        "",
        f"Measured on a CPU, whole runs of random Llamas; the plan is off by {100 * statistics.median(off):.1f} % "
        f"(median), {100 * max(off):.1f} % at most:",
        "",
        "| base | micro-batch | layers recomputed | planned | measured |",
        "|---|---|---|---|---|",
    ]
    for run in found["runs"]:
        sizes = " | ".join(f"{run[name] / 2**20:,.0f} MiB" for name in ("planned_bytes", "peak_bytes"))
        lines.append(f"| {run['size']} | {run['rows']} x {run['length']} | {run['recompute']} | {sizes} |")
    return lines


def by_card(rows: list[dict[str, Any]], cell: Callable[[dict[str, Any]], str]) -> list[str]:
    """A line for each model, a cell for each card."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    return [f"| {each} | " + " | ".join(cell(row) for row in rows if row["model"] == each) + " |" for each in models]


def choice(row: dict[str, Any]) -> str:
    """The peak and how it was reached."""
    if not row["fits"]:
        return "no"
    how = f"{row['recomputed']} / {row['parked']} / {row['streamed']}"
    return f"{row['peak_bytes'] / 2**30:.1f} GiB: {how}{' e' * row['embedding_on_host']}"


def faults_table() -> str:
    """What the product withstood, as far as `make faults` has come."""
    found = read("faults")
    return fault_table.table(found["parts"]) if found else ""


def cards_table() -> str:
    """Where one card's memory goes when two share a model: predicted, in GiB."""
    found = read("many_cards")
    if found is None:
        return ""
    plans, gib = found["plans"], 2**30
    lines = [
        f"[{Path(found['recipe']).stem}]({found['recipe']}), {found['ram']} of main memory; `auto` takes "
        f"{found['auto']}:",
        "",
        f"| one of two {found['card']} cards, predicted | " + " | ".join(plans) + " |",
        "|---" * (len(plans) + 1) + "|",
    ]
    owners = [name for name in next(iter(plans.values()))["owners"] if any(p["owners"][name] for p in plans.values())]
    for name in owners:
        sizes = " | ".join(f"{plan['owners'][name] / gib:.2f} GiB" for plan in plans.values())
        lines.append(f"| {name.replace('_', ' ')} | {sizes} |")
    for words, key in (("peak", "peak_bytes"), ("main memory of its process", "host_bytes")):
        lines.append(f"| {words} | " + " | ".join(f"{plan[key] / gib:.2f} GiB" for plan in plans.values()) + " |")
    lines.append("| how it runs | " + " | ".join(plan["words"] for plan in plans.values()) + " |")
    return "\n".join(lines) + "\n"


TABLES: dict[str, Callable[[], str]] = {
    "speed": speed_table,
    "memory": memory_table,
    "faults": faults_table,
    "cards": cards_table,
}


def drawn(text: str) -> str:
    """`text` with every table between its markers drawn anew."""
    for name, table in TABLES.items():
        before, begin, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        if begin and end:
            text = before + begin + table() + end + after
    return text


if __name__ == "__main__":
    README.write_text(drawn(README.read_text(encoding="utf-8")), encoding="utf-8")
