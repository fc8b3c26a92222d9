"""Every fault of `make faults`, a few of each; failures print their seed."""

import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.child_processes import Child
from support.command_line import qlora
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


@pytest.fixture(scope="module")
def workspace(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> malicious_files.Workspace:
    return malicious_files.make_workspace(tmp_path_factory.mktemp("workspace"), zoo("llama"))


def no_report(result: Any) -> None:
    pass


def test_a_kill_at_any_call_of_a_save_loses_no_checkpoint(seed: int, tmp_path: Path) -> None:
    result = kills.kill_at_calls(tmp_path, every=97, first=1 + seed % 97, report=no_report)
    assert result.clean and result.kills >= 5, result


def test_a_kill_at_any_moment_of_a_run_loses_no_checkpoint(zoo: Zoo, seed: int, tmp_path: Path) -> None:
    result = kills.kill_at_moments(zoo("llama"), tmp_path, 2, seed, no_report)
    assert result.clean and result.kills == 2, result


@pytest.mark.sample(of=2)
@pytest.mark.parametrize(("world", "count"), [(1, 2), (2, 1)])
def test_no_non_finite_value_is_ever_written(zoo: Zoo, seed: int, world: int, count: int, tmp_path: Path) -> None:
    result = non_finite.inject_non_finite(zoo("llama"), tmp_path, count, seed, no_report, world)
    assert result.clean and result.runs == count, result


@pytest.mark.sample(of=2)
@pytest.mark.parametrize(("world", "count"), [(1, 2), (2, 1)])
def test_a_signal_in_any_phase_leaves_an_exact_checkpoint(
    zoo: Zoo, seed: int, world: int, count: int, tmp_path: Path
) -> None:
    result = stop_signals.send_signals(zoo("llama"), tmp_path, count, seed, no_report, world)
    assert result.clean and result.exact + result.refused + result.finished == count, result


@pytest.mark.sample(of=2)
@pytest.mark.parametrize("first", [0, 2], ids=["killed", "raising"])
def test_a_failed_rank_ends_the_others_and_is_reported_once(zoo: Zoo, seed: int, first: int, tmp_path: Path) -> None:
    result = failed_ranks.fail_ranks(zoo("llama"), tmp_path, range(first, first + 2), seed, no_report)
    assert result.clean and result.ranks == 2, result


def test_a_resumed_run_equals_the_uninterrupted_one(zoo: Zoo, seed: int, tmp_path: Path) -> None:
    """A random optimizer, packing, dropout and world size; `make faults` has all combinations."""
    rng, cases = random.Random(seed), list(resume_difference.cases())
    result = resume_difference.resume_all(zoo("llama"), tmp_path, [rng.choice(cases)], (3,), no_report)
    assert result.clean and result.resumes == 1, result


def test_no_flipped_bit_and_no_truncation_goes_unnoticed(workspace: malicious_files.Workspace, seed: int) -> None:
    for folder in (max(workspace.run.glob("checkpoint-*")), workspace.run):
        result = corruption.damage_files(folder, 100, 30, seed, no_report)
        assert result.clean and result.flips + result.cuts == 130, result


def test_the_attacks_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that the other tests place are dangerous: unpickling one creates the canary file."""
    monkeypatch.setenv("QLORA_CANARY", str(tmp_path / "canary"))
    # In a child, because any unpickling in this process fails the test.
    Child(lambda notify: pickle.loads(malicious_files.PICKLE.read_bytes()), tmp_path / "log").wait()
    assert "unpickled" in (tmp_path / "log").read_text()
    monkeypatch.setenv("QLORA_MAY_UNPICKLE", "1")
    Child(lambda notify: pickle.loads(malicious_files.PICKLE.read_bytes()), tmp_path / "log").wait()
    assert (tmp_path / "canary").exists()


def test_all_commands_succeed_without_a_malicious_file(workspace: malicious_files.Workspace, tmp_path: Path) -> None:
    for command in workspace.copy_to(tmp_path).commands(tmp_path):
        assert qlora(*command).code == 0, command


def test_no_malicious_file_runs(workspace: malicious_files.Workspace, seed: int, tmp_path: Path) -> None:
    result = malicious_files.place_all(workspace, tmp_path, slice(seed % 48, None, 48), no_report)
    assert result.clean and result.placements >= 1, result


def test_no_file_name_leads_out_of_its_folder(workspace: malicious_files.Workspace, seed: int, tmp_path: Path) -> None:
    result = hostile_names.open_all(workspace, tmp_path, 300, seed, no_report)
    assert result.clean and result.names == 300, result


def test_no_chat_template_hangs_or_escapes_its_sandbox(seed: int, tmp_path: Path) -> None:
    result = hostile_templates.render_all(tmp_path, slice(seed % 16, None, 16), no_report)
    assert result.clean and result.templates >= 2, result


def test_no_secret_is_written(zoo: Zoo, seed: int, tmp_path: Path) -> None:
    result = planted_secrets.search(zoo("llama"), tmp_path, seed, no_report)
    assert result.clean and result.secrets == 20 and result.redactions >= 20, result
    assert [line for line in result.notes if line.startswith("0 ")] == ["0 check", "0 train", "0 train", "0 export"]


def test_no_mutated_file_ends_in_a_stack_trace(workspace: malicious_files.Workspace, seed: int, tmp_path: Path) -> None:
    result = mutations.mutate_all(workspace, tmp_path, 200, seed, no_report)
    assert result.clean and result.refused > 80, result
