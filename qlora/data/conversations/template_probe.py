"""The template probe: a chat template tried in a child process with limits on time and memory, before any record.

Jinja's sandbox keeps a template from running code, not from looping endlessly or filling memory (reliability G6).
"""

import os
import re
import select
import signal
import time
from contextlib import suppress

from qlora.data.conversations.chat_template import Template, Turn
from qlora.data.types import RecordError
from qlora.errors import DataError
from qlora.utils.machine import GIB
from qlora.utils.sandbox import Limits

PROBE_LIMITS = Limits(seconds=1, memory_bytes=GIB)  # an honest template takes a few hundredths of a second
_WALL_SECONDS = 20.0  # for a machine that is busy with other things
_TEMPLATE_CHARS = 2**20
_RENDERINGS = 3  # of one conversation, compared
_CHANCE = re.compile(r"\|\s*random\b|\blipsum\s*\(")  # what Jinja has of it
_passed: set[tuple[str, ...]] = set()  # keys of the templates that this process has tried already


def probe(template: Template) -> None:
    """Render short conversations under the limits. DataError if the template exceeds them or can't render.

    A template is tried once a process. Where a process can't fork, it is tried without limits.
    """
    if len(template.text) > _TEMPLATE_CHARS:
        raise DataError(f"{template.name}: {len(template.text)} characters, at most {_TEMPLATE_CHARS} are allowed.")
    if template.key in _passed:
        return
    problem = _in_child(template) if hasattr(os, "fork") else _render_all(template)
    if problem:
        raise DataError(f"{template.name}: {problem} Give another one with model.chat_template=FILE.jinja.")
    _passed.add(template.key)


def _conversation(*contents: str) -> list[Turn]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def _render_all(template: Template) -> str:
    """Empty if the template renders a question and an answer, else the problem."""
    needed = [(_conversation("Hello"), True), (_conversation("Hello", "Good day."), False)]
    system: Turn = {"role": "system", "content": "Be brief."}
    optional = [([system, *_conversation("Hello", "Good day.")], False), (_conversation(*["word " * 400] * 12), False)]
    try:
        for turns, prompt in needed:
            template.render(turns, template.sample_tools, prompt)
    except RecordError as error:
        return f"can't render a question and an answer ({error.detail})."
    if _is_random(template, needed[1][0]):
        return "writes another text each time: it depends on the time or on chance."
    for turns, prompt in optional:
        with suppress(RecordError):  # a template may refuse a system turn; what it costs is still measured
            template.render(turns, template.sample_tools, prompt)
    return ""


def _is_random(template: Template, turns: list[Turn]) -> bool:
    """Whether a template's output is not a function of the conversation."""
    texts = {template.render(turns, template.sample_tools) for _ in range(_RENDERINGS)}
    return len(texts) > 1 or bool(_CHANCE.search(template.text))


def _in_child(template: Template) -> str:
    """`_render_all` in a forked child under PROBE_LIMITS."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _run_child(template, writer)
    os.close(writer)
    answer = _read_answer(reader, time.monotonic() + _WALL_SECONDS)
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reader)
    if answer is None:
        return f"was stopped: it took more than {PROBE_LIMITS.seconds} s for a few short turns."
    return answer


def _read_answer(reader: int, deadline: float) -> str | None:
    """What the child wrote before `deadline`, up to a NUL; None if it died or is still running."""
    answer = b""
    while not answer.endswith(b"\0"):
        ready, _, _ = select.select([reader], [], [], max(0.0, deadline - time.monotonic()))
        more = os.read(reader, 65536) if ready else b""
        if not more:
            return None
        answer += more
    return answer[:-1].decode(errors="replace")


def _run_child(template: Template, writer: int) -> None:
    """Render under the limits, write the problem, and exit without the parent's clean-up."""
    try:
        PROBE_LIMITS.apply_to_process()
        answer = _render_all(template)
    except BaseException as error:  # the child must never return into the parent's code
        answer = f"exceeds its limits ({type(error).__name__})."
    with suppress(BaseException):
        os.write(writer, answer.encode()[:60000] + b"\0")
    os._exit(0)
