"""Hostile chat templates on ordinary conversations and on ones that trigger them: each must be stopped."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from qlora.data.conversations.encoder import Encoder
from qlora.data.types import Message
from qlora.errors import QloraError
from support.child_processes import Child, Notify
from support.paths import ATTACKS
from support.tiny_models import byte_tokenizer

SECONDS = 2.0
REFUSED, HARMLESS = 3, 4  # exit codes
TEMPLATES = ATTACKS / "templates"


@dataclass
class Result:
    """Counts of templates, and of those that were not stopped."""

    templates: int = 0
    escaped: int = 0  # created the canary file
    not_stopped: int = 0  # took more than SECONDS for its probe or a conversation, or killed the process
    slowest_seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not (self.escaped or self.not_stopped)


def conversations() -> list[list[Message]]:
    """Conversations that trigger hidden attacks: many turns, a certain word, a long text."""
    turns = [Message(("user", "assistant")[i % 2], f"turn {i}") for i in range(24)]
    texts = ("hello", "say xyzzy", "long " * 2000)
    short = [[Message("user", text), Message("assistant", "fine")] for text in texts]
    return [*short, turns[:4], turns]


def processor_seconds() -> float:
    """Seconds of processor time that this process and its ended children have taken."""
    return time.process_time() + os.times().children_user


def render_all(home: Path, selection: slice, report: Callable[[Result], None]) -> Result:
    """Encode conversations with each template of the folder, in a child each, as training does."""
    result, canary, tokenizer = Result(), home / "canary", byte_tokenizer()
    for path in sorted(TEMPLATES.glob("*.jinja"))[selection]:

        def work(notify: Notify, path: Path = path) -> int:
            os.environ["QLORA_CANARY"] = str(canary)
            times, code = [processor_seconds()], HARMLESS
            try:
                encoder = Encoder(tokenizer, "assistant", str(path))
                times.append(processor_seconds())
                for messages in conversations():
                    encoder.encode_batch([("row", messages)])
                    times.append(processor_seconds())
            except QloraError:
                code = REFUSED
            times.append(processor_seconds())
            notify(f"seconds {max(end - start for start, end in pairwise(times))}")
            return code

        child = Child(work, home / "log")
        code, lines = child.wait(), child.lines()
        seconds = float(lines[-1].split()[1]) if lines else float("inf")
        result.templates += 1
        result.slowest_seconds = max(result.slowest_seconds, seconds)
        if code not in (REFUSED, HARMLESS) or seconds > SECONDS:
            result.not_stopped += 1
            result.notes.append(f"{path.stem}: code {code}, {seconds:.2f} s {(home / 'log').read_text()[-200:]}")
        if canary.exists():
            result.escaped += 1
            result.notes.append(f"{path.stem} escaped")
            canary.unlink()
        report(result)
    return result
