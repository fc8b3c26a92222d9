"""What all tests share: no network, one thread a worker, tiny models that are written once per worker."""

import os
from collections.abc import Callable
from pathlib import Path

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
    from families import save_model

    made: dict[str, Path] = {}

    def folder_of(family: str, **options: object) -> Path:
        key = f"{family}-{sorted((name, str(value)) for name, value in options.items())}"
        if key not in made:
            made[key] = save_model(tmp_path_factory.mktemp(family), family, **options)  # type: ignore[arg-type]
        return made[key]

    return folder_of


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """A library that sets the thread count for itself must not slow the other workers down."""
    torch.set_num_threads(1)
