"""A checkpoint that is not what its run wrote is noticed, and an older one taken."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.small_runs import run
from support.stopped_runs import Session, same_run

from qlora.errors import InputError
from qlora.training.checkpoint import MANIFEST, OPTIMIZER, read


@pytest.fixture(scope="module")
def checkpoint(sessions: Callable[[str], Session]) -> Path:
    return sessions("adamw").folder / "whole" / "checkpoint-000003"


@pytest.mark.xdist_group("resume")
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_and_any_cut_is_noticed(checkpoint: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(file.name for file in checkpoint.iterdir() if file.name != MANIFEST)))
    path = checkpoint / name
    content = path.read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    flip = data.draw(st.booleans())
    damaged = bytearray(content)
    damaged[place] ^= 1 << data.draw(st.integers(0, 7))
    try:
        path.write_bytes(bytes(damaged) if flip else content[:place])
        with pytest.raises(InputError, match=name):
            read(checkpoint)
    finally:
        path.write_bytes(content)
    assert read(checkpoint).position.step == 3


@pytest.mark.xdist_group("resume")
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_manifest_is_noticed_or_says_the_same(checkpoint: Path, data: st.DataObject) -> None:
    path = checkpoint / MANIFEST
    content = path.read_bytes()
    damaged = bytearray(content)
    damaged[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        path.write_bytes(bytes(damaged))
        try:
            read(checkpoint)
        except InputError as error:
            assert str(checkpoint) in str(error)
        else:
            assert json.loads(damaged)["files"] == json.loads(content)["files"]
    finally:
        path.write_bytes(content)


@pytest.mark.xdist_group("resume")
def test_a_damaged_checkpoint_is_passed_over_for_an_older_one(
    sessions: Callable[[str], Session], tmp_path: Path
) -> None:
    session = sessions("adamw")
    output = session.stopped_at(4, tmp_path / "run")
    damaged = output / "checkpoint-000004" / OPTIMIZER
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (output / "checkpoint-000003" / MANIFEST).unlink()
    (output / ".partial-checkpoint-000005").mkdir()
    run(session.recipe(output))
    same_run(session.folder / "whole", output)
    assert not list(output.glob(".partial-*"))
