"""Resource limits: a hostile program is interrupted and can't catch it; afterwards all limits are as before."""

import os
import re
import signal
import threading

import pytest

from qlora.utils.sandbox import LimitExceeded, Limits, within_limits

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no such limits")
TIMERS = {"PROF": (signal.ITIMER_PROF, signal.SIGPROF), "VIRTUAL": (signal.ITIMER_VIRTUAL, signal.SIGVTALRM)}
HAS_STATM = os.path.exists("/proc/self/statm")


def loop_and_catch_exceptions() -> None:
    while True:
        try:
            sum(range(1000))
        except Exception:
            continue


@pytest.mark.parametrize("timer", TIMERS)
def test_a_program_can_not_catch_its_time_limit(timer: str) -> None:
    number, signal_number = TIMERS[timer]
    handler = signal.getsignal(signal_number)
    with pytest.raises(LimitExceeded):
        Limits(0.05, 2**30, timer).call(loop_and_catch_exceptions)  # type: ignore[arg-type]
    assert signal.getsignal(signal_number) == handler and signal.getitimer(number) == (0.0, 0.0)


def test_a_slow_regular_expression_is_interrupted() -> None:
    with pytest.raises(LimitExceeded):
        within_limits(lambda: re.fullmatch("(a+)+b", "a" * 40))
    assert within_limits(lambda: re.fullmatch("(a+)+b", "aab")) is not None


@pytest.mark.skipif(not HAS_STATM, reason="the size of a process is not known here")
def test_memory_is_limited_and_the_limit_is_restored() -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(MemoryError):
        Limits(5, 2**28).call(lambda: bytearray(2**30))
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_an_outer_time_limit_continues_after_an_inner_one() -> None:
    with pytest.raises(LimitExceeded), Limits(0.2, 2**30).time():
        with pytest.raises(LimitExceeded), Limits(0.05, 2**30).time():
            loop_and_catch_exceptions()
        loop_and_catch_exceptions()
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_outside_the_main_thread_there_is_no_limit() -> None:
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(within_limits(lambda: 1)))
    thread.start()
    thread.join()
    assert results == [1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system can't fork")
def test_a_child_with_a_process_limit_is_killed() -> None:
    child = os.fork()
    if child == 0:
        try:
            Limits(1, 2**30).apply_to_process()
            loop_and_catch_exceptions()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGXCPU)
