"""A share of every fault of `make faults`, in every test run."""

import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.child_processes import Child
from support.faults import (
    corruption,
    failed_ranks,
    hostile_names,
    hostile_templates,
    kills,
    malicious_files,
    mutations,
    non_finite,
    planted_secrets,
    resume_difference,
    stop_signals,
)

Zoo = Callable[..., Path]
pytestmark = pytest.mark.xdist_group("faults")


@pytest.fixture(scope="module")
def scene(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> malicious_files.Scene:
    return malicious_files.scene_in(tmp_path_factory.mktemp("scene"), zoo("llama"))


def no_report(found: Any) -> None:
    pass


def test_a_kill_at_any_call_of_a_save_loses_nothing(tmp_path: Path) -> None:
    found = kills.kill_at_calls(tmp_path, every=23, first=random.randint(1, 23), report=no_report)
    assert found.clean and found.kills >= 20, found


def test_a_kill_at_any_moment_of_a_run_loses_nothing(zoo: Zoo, tmp_path: Path) -> None:
    found = kills.kill_at_moments(zoo("llama"), tmp_path, 10, random.randint(0, 10**6), no_report)
    assert found.clean and found.kills == 10, found


@pytest.mark.parametrize(("world", "count"), [(1, 6), (2, 2)])
def test_nothing_that_is_not_finite_is_ever_written(zoo: Zoo, world: int, count: int, tmp_path: Path) -> None:
    found = non_finite.poison(zoo("llama"), tmp_path, count, random.randint(0, 10**6), no_report, world)
    assert found.clean and found.runs == count, found


@pytest.mark.parametrize(("world", "count"), [(1, 6), (2, 2)])
def test_a_signal_in_any_phase_ends_in_an_exact_checkpoint(zoo: Zoo, world: int, count: int, tmp_path: Path) -> None:
    found = stop_signals.stop(zoo("llama"), tmp_path, count, random.randint(0, 10**6), no_report, world)
    assert found.clean and found.exact + found.refused + found.finished == count, found


def test_a_rank_that_dies_ends_the_others_at_once_and_is_named_once(zoo: Zoo, tmp_path: Path) -> None:
    found = failed_ranks.part(zoo("llama"), tmp_path, 4, random.randint(0, 10**6), no_report)
    assert found.clean and found.ranks == 4, found


def test_resumed_in_any_way_is_never_having_stopped(zoo: Zoo, tmp_path: Path) -> None:
    """Each optimiser once, packing, dropout and processes drawn; all combinations in `make faults`."""
    every = list(resume_difference.cases())
    chosen = [random.choice(every[first : first + 8]) for first in range(0, len(every), 8)]
    found = resume_difference.resume_all(zoo("llama"), tmp_path, chosen, (3,), no_report)
    assert found.clean and found.resumes == len(chosen), found


def test_no_flip_and_no_cut_is_read_as_if_it_were_whole(scene: malicious_files.Scene) -> None:
    for folder in (max(scene.run.glob("checkpoint-*")), scene.run):
        found = corruption.damage(folder, 200, 60, random.randint(0, 10**6), no_report)
        assert found.clean and found.flips + found.cuts == 260, found


def test_the_attacks_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the other tests place is dangerous: unpickled, it makes the canary."""
    monkeypatch.setenv("QLORA_CANARY", str(tmp_path / "canary"))
    # In a child, since in this process any unpickling is an error of its own.
    Child(lambda tell: pickle.loads(malicious_files.PICKLE.read_bytes()), tmp_path / "said").end()
    assert "unpickled" in (tmp_path / "said").read_text()
    monkeypatch.setenv("QLORA_MAY_UNPICKLE", "1")
    Child(lambda tell: pickle.loads(malicious_files.PICKLE.read_bytes()), tmp_path / "said").end()
    assert (tmp_path / "canary").exists()


def test_the_commands_of_the_placements_work_where_nothing_was_placed(
    scene: malicious_files.Scene, tmp_path: Path
) -> None:
    from support.command_line import qlora

    for command in scene.fresh(tmp_path).commands(tmp_path):
        assert qlora(*command).code == 0, command


def test_no_malicious_file_runs(scene: malicious_files.Scene, tmp_path: Path) -> None:
    found = malicious_files.place_all(scene, tmp_path, slice(random.randint(0, 15), None, 16), no_report)
    assert found.clean and found.placements >= 4, found


def test_no_name_in_a_file_leads_out_of_its_folder(scene: malicious_files.Scene, tmp_path: Path) -> None:
    found = hostile_names.follow_all(scene, tmp_path, 300, random.randint(0, 10**6), no_report)
    assert found.clean and found.names == 300, found


def test_no_chat_template_runs_for_ever_or_gets_out(tmp_path: Path) -> None:
    found = hostile_templates.render_all(tmp_path, slice(random.randint(0, 3), None, 4), no_report)
    assert found.clean and found.templates >= 10, found


def test_no_secret_is_written(zoo: Zoo, tmp_path: Path) -> None:
    found = planted_secrets.search(zoo("llama"), tmp_path, random.randint(0, 10**6), no_report)
    assert found.clean and found.secrets == 20 and found.redactions >= 20, found
    assert [line for line in found.notes if line.startswith("0 ")] == ["0 check", "0 train", "0 train", "0 export"]


def test_no_mutant_ends_in_a_stack_trace(scene: malicious_files.Scene, tmp_path: Path) -> None:
    found = mutations.mutate_all(scene, tmp_path, 500, random.randint(0, 10**6), no_report)
    assert found.clean and found.refused > 200, found
