"""The README's table of injected faults, drawn from results/faults.json and results/fault_peers.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
START, END = "<!-- faults -->", "<!-- /faults -->"
# The first column, the part of the results, the count of injected faults, and the counts that must be 0.
ROWS = (
    ("`kill -9` at every file-system call of a save", "kills at calls", "kills", ("lost", "half_read", "litter")),
    ("`kill -9` at random moments of a run", "kills at moments", "kills", ("lost", "half_read", "litter")),
    ("NaN or infinity in loss, gradient, activation", "poison, 1 process", "runs", ("non_finite_values", "moved")),
    ("the same with 2 processes", "poison, 2 processes", "runs", ("non_finite_values", "moved")),
    ("SIGTERM, SIGINT in every phase", "signals, 1 process", "signals", ("wrong", "orphans")),
    ("the same with 2 processes", "signals, 2 processes", "signals", ("wrong", "orphans")),
    ("the same under `accelerate launch`", "signals, launcher", "signals", ("wrong", "orphans")),
    ("a rank killed or failing, DDP and FSDP", "ranks that die", "ranks", ("hangs", "unpunished", "orphans", "unsaid")),
    ("runs resumed from a checkpoint", "resumes", "resumes", ("max_difference", "other_lines", "failed")),
    ("flipped bits", "flips and cuts", "flips", ("undetected",)),
    ("truncated files", "flips and cuts", "cuts", ("undetected",)),
    ("malicious files", "placements", "placements", ("canaries", "traces")),
    ("hostile path names", "path names", "names", ("outside", "believed")),
    ("hostile chat templates", "templates", "templates", ("escaped", "not_stopped")),
    ("planted secrets", "secrets", "secrets", ("hits",)),
    ("mutated adapters, checkpoints, configurations", "mutants", "mutants", ("crashes", "hangs", "traces")),
)
LABELS = {  # key in the results -> text in the table
    "lost": "checkpoints lost",
    "half_read": "damaged checkpoints accepted",
    "litter": "temporary files left",
    "non_finite_values": "non-finite values written",
    "moved": "weights changed by a skipped step",
    "wrong": "without an exact checkpoint",
    "orphans": "orphan processes",
    "hangs": "hangs",
    "unpunished": "surviving ranks",
    "unsaid": "failures without a message",
    "max_difference": "difference from the uninterrupted run",
    "other_lines": "different metrics",
    "failed": "failures",
    "undetected": "undetected",
    "canaries": "executed",
    "traces": "stack traces",
    "outside": "files opened outside the folder",
    "believed": "accepted",
    "escaped": "sandbox escapes",
    "not_stopped": "over the time limit",
    "hits": "found in files or output",
    "crashes": "crashes",
}
KEYS = {"survivors": "unpunished", "unreported": "unsaid"}  # count in tests/support/faults/ -> key in the results


def draw(parts: Mapping[str, Any]) -> None:
    """Write the table between the README's markers, if they are there."""
    text = README.read_text(encoding="utf-8")
    if START not in text or END not in text:
        return
    before, rest = text.split(START, 1)
    README.write_text(f"{before}{START}\n{table(parts)}{END}{rest.split(END, 1)[1]}", encoding="utf-8")


def table(parts: Mapping[str, Any]) -> str:
    """A row for each part that has run: the fault, how often it was injected, and the result."""
    path = HERE / "results" / "fault_peers.json"
    peers = peer_results(json.loads(path.read_text())) if path.exists() else {}
    lines = ["| injected fault | times | qlora | Trainer, accelerate, PEFT |", "|---|---|---|---|"]
    for label, part, times, zeros in ROWS:
        if part in parts:
            counts = parts[part]
            result = ", ".join(f"{counts[key]:g} {LABELS[key]}" for key in zeros)
            lines.append(f"| {label} | {counts[times]:,} | {result} | {peers.pop(part, '')} |")
    return "\n".join(lines) + "\n"


def peer_results(results: Mapping[str, Any]) -> dict[str, str]:
    """The results of the other libraries, by part: the same faults, a smaller number of them."""
    trainer, state, poison, flips = (results[name] for name in ("trainer", "accelerate", "poison", "flips"))
    return {
        "kills at moments": f"Trainer: newest checkpoint unusable in {trainer['unusable']} of {trainer['kills']}; "
        f"accelerate's save_state: {state['unusable']} of {state['kills']}",
        "poison, 1 process": f"Trainer after one NaN: exit code {poison['exit_code']}, "
        f"{poison['non_finite_values']:,} of {poison['values']:,} saved values not finite",
        "flips and cuts": f"PEFT: {flips['undetected']} of {flips['flips']} damaged files loaded without an error",
    }
