"""The tables of docs/beyond.md, from the planner alone: python beyond.py draws them anew. All of it is predicted."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.published_models import work_of  # noqa: E402 - the shapes that the tests prove

from qlora.memory.planner.cost_model import DeviceSpeed, seconds  # noqa: E402
from qlora.memory.planner.memory_plan import Budget  # noqa: E402
from qlora.memory.planner.search import choose  # noqa: E402
from qlora.memory.planner.workload import Workload  # noqa: E402

PAGE = ROOT / "docs/beyond.md"
GIB = 2**30
PLANS = (
    ("Llama-3.1-405B", 80, 256),
    ("Llama-3.1-70B", 12, 64),
    ("Llama-3.1-70B", 16, 64),
)  # card and main memory in GiB
LENGTHS = (512, 2048, 4096, 8192)
REACHED = 0.65  # of a card's dense bfloat16 peak: the best published shares are 0.62 to 0.71
CARDS = {"RTX 3090": 71e12, "RTX 4090": 165.2e12, "RTX 5090": 209.5e12, "A100": 312e12}  # FLOP/s
LINKS = {"3 x8": 6.25e9, "3 x16 or 4 x8": 12.5e9, "4 x16 or 5 x8": 25e9, "5 x16": 50e9}  # bytes/s that copies reach
STEP, MOST = 32, 65_536  # tokens


def plans_table() -> str:
    """What the planner chooses for models that no such card holds."""
    lines = [
        "| model | card | main memory | tokens | card needs | main memory needs | recompute / park / stream | of |"
    ]
    lines.append("|---" * 8 + "|")
    for name, card, host in PLANS:
        for length in LENGTHS:
            work = work_of(name, max_length=length)
            lines.append(f"| {name} | {card} GiB | {host} GiB | {length:,} | {_planned(work, card, host)} |")
    return "\n".join(lines) + "\n"


def _planned(work: Workload, card: int, host: int) -> str:
    found = choose(work, Budget(card * GIB, host * GIB))
    if not found.fits:
        return "does not fit | | |"
    way = f"{found.work.recomputed} / {found.work.parked} / {found.work.streamed}"
    return f"{found.peak_bytes / GIB:.1f} GiB | {found.host_bytes / GIB:.1f} GiB | {way} | {work.shapes.layers}"


def free_table() -> str:
    """Tokens of a micro-batch from which a wholly streamed 70B takes no longer than a resident one."""
    lines = ["| card | " + " | ".join(f"PCIe {link}" for link in LINKS) + " |", "|---" * (len(LINKS) + 1) + "|"]
    for card, peak in CARDS.items():
        cells = [f"{free_from(DeviceSpeed(REACHED * peak, link)):,}" for link in LINKS.values()]
        lines.append(f"| {card} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def free_from(pace: DeviceSpeed) -> int:
    """The fewest tokens, in steps of STEP, at which every copy hides behind a product, all layers recomputed."""
    work = work_of("Llama-3.1-70B")
    for tokens in range(STEP, MOST, STEP):
        resident = replace(work, max_length=tokens)
        if seconds(replace(resident, weights="stream"), pace) <= seconds(resident, pace):
            return tokens
    raise ValueError(f"streaming is never free at {pace}")


TABLES: dict[str, Callable[[], str]] = {"plans": plans_table, "free": free_table}


def drawn(text: str, tables: dict[str, Any] = TABLES) -> str:
    """`text` with every table between its markers drawn anew."""
    for name, table in tables.items():
        before, begin, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        text = before + begin + table() + end + after
    return text


if __name__ == "__main__":
    PAGE.write_text(drawn(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
