"""Hostile chat templates on honest rows and on rows that wake them: each must be stopped."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from qlora.data.conversations.encoder import Encoder
from qlora.data.types import Message
from qlora.errors import QloraError
from support.child_processes import Child, Tell
from support.paths import ATTACKS
from support.tiny_models import byte_tokenizer

SECONDS = 2.0
REFUSED, HARMLESS, SLOW = 3, 4, 5


TEMPLATES = ATTACKS / "templates"


@dataclass
class Found:
    """What became of the templates."""

    templates: int = 0
    escaped: int = 0  # made the canary
    not_stopped: int = 0  # ran for more than SECONDS of processor time, or ended the process
    slowest_seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not (self.escaped or self.not_stopped)


def conversations() -> list[list[Message]]:
    """Rows that wake what sleeps: many turns, a word, a long text."""
    turns = [Message(("user", "assistant")[i % 2], f"turn {i}") for i in range(24)]
    texts = ("hello", "say xyzzy", "long " * 2000)
    asked = [[Message("user", text), Message("assistant", "fine")] for text in texts]
    return [*asked, turns[:4], turns]


def render_all(home: Path, chosen: slice, report: Callable[[Found], None]) -> Found:
    """Each template of the folder in a child of its own, used as training uses it."""
    found, canary, tokenizer = Found(), home / "canary", byte_tokenizer()
    for path in sorted(TEMPLATES.glob("*.jinja"))[chosen]:

        def work(tell: Tell, path: Path = path) -> int:
            os.environ["QLORA_CANARY"] = str(canary)
            started = time.process_time()
            try:
                encoder = Encoder(tokenizer, "assistant", str(path))
                encoder.encode_all([("row", messages) for messages in conversations()])
                code = HARMLESS
            except QloraError:
                code = REFUSED
            tell(f"seconds {time.process_time() - started + os.times().children_user}")
            return code

        child = Child(work, home / "said")
        code, lines = child.end(), child.lines()
        seconds = float(lines[-1].split()[1]) if lines else float("inf")
        found.templates += 1
        found.slowest_seconds = max(found.slowest_seconds, seconds)
        if code not in (REFUSED, HARMLESS) or seconds > SECONDS:
            found.not_stopped += 1
            found.notes.append(f"{path.stem}: code {code}, {seconds:.2f} s {(home / 'said').read_text()[-200:]}")
        if canary.exists():
            found.escaped += 1
            found.notes.append(f"{path.stem} escaped")
            canary.unlink()
        report(found)
    return found
