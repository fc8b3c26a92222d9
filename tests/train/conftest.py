"""Uninterrupted runs, one an optimiser, that many tests compare theirs with."""

from collections.abc import Callable

import pytest
from sessions import Session, Zoo


@pytest.fixture(scope="session")
def sessions(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Session]:
    made: dict[str, Session] = {}

    def session(kind: str) -> Session:
        if kind not in made:
            made[kind] = Session(zoo("llama"), tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return session
