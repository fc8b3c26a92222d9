"""What all tests share: no network, no unpickling, one thread a worker, tiny models, each written once."""

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["QLORA_CACHE"] = ""  # no test reads or leaves prepared data of another
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)

MakeModel = Callable[..., Path]


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """`zoo("gemma2", dtype=...)`: the folder of a tiny random model, made when first asked for. Never write into it."""
    from support.tiny_models import save_model

    made: dict[str, Path] = {}

    def folder_of(family: str, **options: object) -> Path:
        key = f"{family}-{sorted((name, str(value)) for name, value in options.items())}"
        if key not in made:
            made[key] = save_model(tmp_path_factory.mktemp(family), family, **options)  # type: ignore[arg-type]
        return made[key]

    return folder_of


# Pickle is spoken over pipes between a process and its own children (data/workers.py), and by torch.compile with its
# own cache; files of a user's or of the world's are never unpickled.
_PIPES = ("multiprocessing", "concurrent", "_inductor", "_functorch", "_dynamo")
_unpickled: list[str] = []


def _no_pickle(event: str, arguments: tuple[object, ...]) -> None:
    """An audit hook: whatever looks up a class or a function for a pickle fails the test that it happened in."""
    if event != "pickle.find_class" or os.environ.get("QLORA_MAY_UNPICKLE"):
        return
    frames = traceback.extract_stack()
    if not any(part in frame.filename.split(os.sep) for frame in frames for part in _PIPES):
        _unpickled.append(f"{arguments[0]}.{arguments[1]} at {frames[-2].filename}:{frames[-2].lineno}")
        raise RuntimeError(f"unpickled {_unpickled[-1]}")


sys.addaudithook(_no_pickle)


@pytest.fixture(autouse=True)
def _nothing_was_unpickled() -> Iterator[None]:
    """Also where the error that the hook raised was caught."""
    _unpickled.clear()
    yield
    assert _unpickled == []


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """A library that sets the thread count for itself must not slow the other workers down."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def sessions(zoo: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """`sessions("adamw")`: an uninterrupted run of that optimizer, trained when first asked for."""
    from support.stopped_runs import Session

    runs: dict[str, Session] = {}

    def session(kind: str) -> Session:
        if kind not in runs:
            runs[kind] = Session(zoo("llama"), tmp_path_factory.mktemp(kind), kind)
        return runs[kind]

    return session
