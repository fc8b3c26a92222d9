"""A checkpoint that differs from what its run wrote is detected, and an older one is resumed from."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.small_runs import run
from support.stopped_runs import ReferenceRun, assert_same_run

from qlora.errors import InputError
from qlora.training.checkpoint import MANIFEST, OPTIMIZER, read


@pytest.fixture(scope="module")
def checkpoint(reference_runs: Callable[[str], ReferenceRun]) -> Path:
    return reference_runs("adamw").output / "checkpoint-000003"


@pytest.mark.xdist_group("resume")
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_and_any_truncation_is_detected(checkpoint: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(file.name for file in checkpoint.iterdir() if file.name != MANIFEST)))
    path = checkpoint / name
    content = path.read_bytes()
    offset = data.draw(st.integers(0, len(content) - 1))
    flip = data.draw(st.booleans())
    damaged = bytearray(content)
    damaged[offset] ^= 1 << data.draw(st.integers(0, 7))
    try:
        path.write_bytes(bytes(damaged) if flip else content[:offset])
        with pytest.raises(InputError, match=name):
            read(checkpoint)
    finally:
        path.write_bytes(content)
    assert read(checkpoint).position.step == 3


@pytest.mark.xdist_group("resume")
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_manifest_is_detected_or_lists_the_same_files(checkpoint: Path, data: st.DataObject) -> None:
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
def test_a_damaged_checkpoint_is_skipped_for_an_older_one(
    reference_runs: Callable[[str], ReferenceRun], tmp_path: Path
) -> None:
    reference = reference_runs("adamw")
    output = reference.copy_until(4, tmp_path / "run")
    damaged = output / "checkpoint-000004" / OPTIMIZER
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (output / "checkpoint-000003" / MANIFEST).unlink()
    (output / ".partial-checkpoint-000005").mkdir()
    run(reference.recipe(output))
    assert_same_run(reference.output, output)
    assert not list(output.glob(".partial-*"))
