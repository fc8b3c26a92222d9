"""Fixtures and rules of all tests: no network, no unpickling, one thread, tiny models that are written once."""

import gc
import itertools
import os
import random
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["QLORA_CACHE"] = ""  # tests do not share prepared data
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from support.case_samples import mark_samples
from support.work_groups import FolderScheduling, longest_first

MakeModel = Callable[..., Path]
# Tens of thousands of waits for the disk: a killed process loses nothing without them, only a machine without power.
os.fsync = lambda fd: None

# Which part of the long lists runs; the workers of xdist take it from the environment of the first process.
SAMPLE = int(os.environ.setdefault("QLORA_TEST_SAMPLE", str(random.SystemRandom().randrange(10**6))))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Before cases are deselected by their marks."""
    mark_samples(items, SAMPLE, config.option.markexpr, config.args)
    items[:] = longest_first(items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """What tests share is built in one process, not in two."""
    config.option.loadscopereorder = False  # by their time, not by their number
    return FolderScheduling(config, log)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The sample of this run, with which it can be run again."""
    terminalreporter.write_line(f"QLORA_TEST_SAMPLE={SAMPLE}")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[object]:
    """Imports make millions of objects that stay: no collection looks at them meanwhile."""
    from hypothesis import settings

    settings.register_profile("quick", max_examples=30, deadline=None)  # other ones in every run
    settings.load_profile("quick")
    gc.disable()
    result = yield
    gc.enable()
    return result


def pytest_collection_finish() -> None:
    """Answers in the report of a run have 2 tokens, not 48: else they take longer than the training of a tiny model."""
    _set_one_thread()
    if module := sys.modules.get("qlora.runs.write_artifacts"):
        module.SAMPLE_TOKENS = 2  # type: ignore[attr-defined]
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Garbage collection never again looks at what is there after a module: the libraries' millions of objects."""
    yield
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()


def pytest_unconfigure() -> None:
    """At exit all is freed: libraries report what is left."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """`zoo("gemma2", dtype=...)`: the folder of a tiny random model, saved at its first use. Never write into it."""
    from support.tiny_models import save_model

    folders: dict[str, Path] = {}

    def folder_of(family: str, **options: object) -> Path:
        key = f"{family}-{sorted((name, str(value)) for name, value in options.items())}"
        if key not in folders:
            folders[key] = save_model(tmp_path_factory.mktemp(family), family, **options)  # type: ignore[arg-type]
        return folders[key]

    return folder_of


@pytest.fixture(scope="session")
def expert_zoo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`expert_zoo("mixtral")`: the folder of a tiny random model of experts. Never write into it."""
    from support.expert_models import save_expert_model

    return cache(lambda family: save_expert_model(tmp_path_factory.mktemp(family), family))


_folders = itertools.count()


@pytest.fixture
def tmp_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new folder of the test. pytest's own fixture reads the names of all others before it makes one."""
    folder = tmp_path_factory.getbasetemp() / f"{next(_folders)}-{re.sub(r'[^A-Za-z]+', '_', request.node.name)[:30]}"
    folder.mkdir()
    return folder


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A new random seed; pytest prints it if the test fails, and QLORA_TEST_SEED=N sets it again."""
    value = int(os.environ.get("QLORA_TEST_SEED") or random.SystemRandom().randrange(10**6))
    request.node.add_report_section("setup", "seed", f"QLORA_TEST_SEED={value}")
    return value


# Pickle is used over pipes between a process and its own children (data/conversations/worker_pool.py), and by
# torch.compile for its cache; downloaded files and user files are never unpickled.
_ALLOWED_PICKLE = ("multiprocessing", "concurrent", "_inductor", "_functorch", "_dynamo")
_unpickled: list[str] = []


def _forbid_pickle(event: str, arguments: tuple[object, ...]) -> None:
    """An audit hook: looking up a class or function for a pickle fails the test in which it happens."""
    if event != "pickle.find_class" or os.environ.get("QLORA_MAY_UNPICKLE"):
        return
    frames = traceback.extract_stack()
    if not any(name in frame.filename.split(os.sep) for frame in frames for name in _ALLOWED_PICKLE):
        _unpickled.append(f"{arguments[0]}.{arguments[1]} at {frames[-2].filename}:{frames[-2].lineno}")
        raise RuntimeError(f"unpickled {_unpickled[-1]}")


sys.addaudithook(_forbid_pickle)


@pytest.fixture(autouse=True)
def _nothing_was_unpickled() -> Iterator[None]:
    """Fails the test even if the error that the hook raised was caught."""
    _unpickled.clear()
    yield
    assert _unpickled == []


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Every test starts with one thread, even if a library has set another number."""
    _set_one_thread()


def _set_one_thread() -> None:
    import torch  # not at the top: the process that only hands out the tests does without

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def reference_runs(zoo: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """`reference_runs("adamw")`: an uninterrupted run of that optimizer, trained at its first use."""
    from support.stopped_runs import ReferenceRun

    runs: dict[str, ReferenceRun] = {}

    def reference_run(kind: str) -> ReferenceRun:
        if kind not in runs:
            runs[kind] = ReferenceRun(zoo("llama"), tmp_path_factory.mktemp(kind), kind)
        return runs[kind]

    return reference_run
