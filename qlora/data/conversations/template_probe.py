"""A chat template tried out in a child process with ceilings on time and memory, before it renders a data set.

Jinja's sandbox keeps a template from running code, not from running for ever or filling memory (reliability G6).
"""

import os
import select
import signal
import time
from contextlib import suppress
from pathlib import Path

from qlora.data.conversations.chat_template import Template, Turn
from qlora.data.types import RecordError
from qlora.errors import DataError

_CPU_SECONDS = 1  # an honest template takes a few hundredths
_WALL_SECONDS = 20.0  # for a machine that is busy with other things
_MEMORY_BYTES = 2**30  # beyond what the process holds already
_TEMPLATE_CHARS = 2**20


def probe(template: Template) -> None:
    """Render short conversations under the ceilings. DataError if the template goes beyond them or can't render them.

    Where a process can't fork the template is tried without ceilings.
    """
    if len(template.text) > _TEMPLATE_CHARS:
        raise DataError(f"{template.name}: {len(template.text)} characters, at most {_TEMPLATE_CHARS} are allowed.")
    answer = _in_child(template) if hasattr(os, "fork") else _probe_all(template)
    if answer:
        raise DataError(f"{template.name}: {answer} Give another one with model.chat_template=FILE.jinja.")


def _said(*contents: str) -> list[Turn]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def _probe_all(template: Template) -> str:
    """Empty if the template renders a question and an answer; what it did wrong otherwise."""
    needed = [(_said("Hello"), True), (_said("Hello", "Good day."), False)]
    system: Turn = {"role": "system", "content": "Be brief."}
    others = [([system, *_said("Hello", "Good day.")], False), (_said(*["word " * 400] * 12), False)]
    try:
        for turns, prompt in needed:
            template.render(turns, None, prompt)
    except RecordError as error:
        return f"can't render a question and an answer ({error.detail})."
    for turns, prompt in others:
        with suppress(RecordError):  # a template may refuse a system turn; what matters is what it costs
            template.render(turns, None, prompt)
    return ""


def _in_child(template: Template) -> str:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _serve(template, writer)
    os.close(writer)
    answer = _await(reader, time.monotonic() + _WALL_SECONDS)
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reader)
    if answer is None:
        return f"was stopped: it took more than {_CPU_SECONDS} s for a few short turns."
    return answer


def _await(reader: int, deadline: float) -> str | None:
    """What the child said before `deadline`; None if it died or went on. The last byte of an answer is a NUL."""
    heard = b""
    while not heard.endswith(b"\0"):
        ready, _, _ = select.select([reader], [], [], max(0.0, deadline - time.monotonic()))
        more = os.read(reader, 65536) if ready else b""
        if not more:
            return None
        heard += more
    return heard[:-1].decode(errors="replace")


def _serve(template: Template, writer: int) -> None:
    """The child's life: render under the ceilings, write what was wrong, and leave without the parent's clean-up."""
    try:
        _limit()
        answer = _probe_all(template)
    except BaseException as error:  # the child must never return into the parent's code
        answer = f"goes beyond its ceilings ({type(error).__name__})."
    with suppress(BaseException):
        os.write(writer, answer.encode()[:60000] + b"\0")
    os._exit(0)


def _limit() -> None:
    import resource  # only where there is fork

    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS))
    with suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        ceiling = pages * os.sysconf("SC_PAGE_SIZE") + _MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (ceiling, resource.RLIM_INFINITY))
