"""The scoreboard of faults in the README, drawn from results/faults.json and results/fault_peers.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
START, END = "<!-- faults -->", "<!-- /faults -->"
# What is written in the first column, the part it comes from, what was done to it, and what must be 0.
ROWS = (
    ("`kill -9` at every file-system call of a save", "kills at calls", "kills", ("lost", "half_read", "litter")),
    ("`kill -9` at random moments of a run", "kills at moments", "kills", ("lost", "half_read", "litter")),
    ("NaN or infinity in loss, gradient, activation", "poison, 1 process", "runs", ("non_finite_values", "moved")),
    ("the same in 2 processes", "poison, 2 processes", "runs", ("non_finite_values", "moved")),
    ("SIGTERM, SIGINT in every phase", "signals, 1 process", "signals", ("wrong", "orphans")),
    ("the same in 2 processes", "signals, 2 processes", "signals", ("wrong", "orphans")),
    ("the same under `accelerate launch`", "signals, launcher", "signals", ("wrong", "orphans")),
    ("a rank killed or failing, DDP and FSDP", "ranks that die", "ranks", ("hangs", "unpunished", "orphans", "unsaid")),
    ("resumed instead of never stopped", "resumes", "resumes", ("max_difference", "other_lines", "failed")),
    ("bits flipped", "flips and cuts", "flips", ("undetected",)),
    ("files cut", "flips and cuts", "cuts", ("undetected",)),
    ("malicious files placed", "placements", "placements", ("canaries", "traces")),
    ("hostile path names", "path names", "names", ("outside", "believed")),
    ("hostile chat templates", "templates", "templates", ("escaped", "not_stopped")),
    ("secrets planted", "secrets", "secrets", ("hits",)),
    ("adapters, checkpoints, configurations mutated", "mutants", "mutants", ("crashes", "hangs", "traces")),
)


def draw(parts: Mapping[str, Any]) -> None:
    """Put the table between the README's markers, if they are there."""
    text = README.read_text(encoding="utf-8")
    if START not in text or END not in text:
        return
    before, rest = text.split(START, 1)
    README.write_text(f"{before}{START}\n{table(parts)}{END}{rest.split(END, 1)[1]}", encoding="utf-8")


def table(parts: Mapping[str, Any]) -> str:
    """A row for each part that has run: what was done, how often, and what came of it."""
    peers = HERE / "results" / "fault_peers.json"
    theirs = of_peers(json.loads(peers.read_text())) if peers.exists() else {}
    lines = ["| what was done | times | here | others |", "|---|---|---|---|"]
    for label, part, times, zeros in ROWS:
        if part in parts:
            found = parts[part]
            ours = ", ".join(f"{found[zero]:g} {zero.replace('_', ' ')}" for zero in zeros)
            lines.append(f"| {label} | {found[times]:,} | {ours} | {theirs.pop(part, '')} |")
    return "\n".join(lines) + "\n"


def of_peers(found: Mapping[str, Any]) -> dict[str, str]:
    """What became of the others, by part: the same faults, a smaller number of them."""
    trainer, state, poison, flips = (found[name] for name in ("trainer", "accelerate", "poison", "flips"))
    return {
        "kills at moments": f"Trainer: newest unusable in {trainer['unusable']} of {trainer['kills']}; "
        f"accelerate's save_state: {state['unusable']} of {state['kills']}",
        "poison, 1 process": f"Trainer after one NaN: exit code {poison['exit_code']}, "
        f"{poison['non_finite_values']:,} of {poison['values']:,} saved values not finite",
        "flips and cuts": f"PEFT: {flips['undetected']} of {flips['flips']} load unnoticed",
    }
