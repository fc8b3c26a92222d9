"""Runs of objectives that compare answers, from the command line: train, eval, preview, a reference in a folder."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.command_line import qlora
from support.preferences import write_answers, write_pairs
from support.small_runs import adapter_tensors, metrics, recipe_of, run

from qlora.errors import AdapterError
from qlora.recipe.recipe import Recipe, dump
from qlora.runs.advise.preferences import judge_answers

Zoo = Callable[..., Path]
PAIRS = 10


def recipe_for(model: Path, data: Path, output: Path, kind: str, *overrides: str) -> Recipe:
    options = (
        f"objective.kind={kind}",
        "train.max_steps=4",
        "optim.learning_rate=2e-3",
        "data.eval_fraction=0.2",
        "data.max_length=160",
    )
    return recipe_of(model, data, output, *options, *overrides)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", PAIRS)


@pytest.fixture(scope="module")
def trained(zoo: Zoo, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of DPO."""
    output = tmp_path_factory.mktemp("trained") / "run"
    manifest = run(recipe_for(zoo("llama"), pairs, output, "dpo"))
    assert manifest["data"]["kept"] == PAIRS and manifest["result"]["eval_loss"] < 0.6931
    return output


@pytest.mark.sample(of=2)
@pytest.mark.parametrize("kind", ["ipo", "orpo", "simpo", "kto"])
def test_every_other_kind_trains(zoo: Zoo, tmp_path: Path, kind: str) -> None:
    data = write_answers(kind, tmp_path / "rows.jsonl", PAIRS)
    run(recipe_for(zoo("llama"), data, tmp_path / "run", kind, "data.packing=true", "optim.learning_rate=1e-2"))
    evaluations = metrics(tmp_path / "run", "eval")
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"] or kind == "kto"
    assert metrics(tmp_path / "run")[-1]["margin"] is not None
    assert ("eval_kl" in evaluations[0]) == (kind == "kto")


def test_eval_of_a_run_on_its_pairs_and_on_others(trained: Path, pairs: Path) -> None:
    result = qlora("eval", trained, "--task", "preference", "--data", pairs, "--beside-base", "--json").json
    assert result["task"] == "preference" and result["rows"] == PAIRS
    assert result["score"] > 0.5 and result["margin"] > 0 and result["loss"] < 0.6931
    assert 0 <= result["base"]["likelier"] <= result["likelier"] <= 1
    held_out = qlora("eval", trained, "--task", "preference", "--json").json
    assert held_out["loss"] == pytest.approx(metrics(trained, "eval")[-1]["eval_loss"], rel=1e-5)
    loss = qlora("eval", trained, "--json").json  # of the chosen answers, as supervised training would measure it
    assert loss["rows"] == held_out["rows"] and loss["tokens"] < held_out["tokens"]


def test_eval_of_a_model_needs_pairs(zoo: Zoo, trained: Path, pairs: Path, tmp_path: Path) -> None:
    assert qlora("eval", zoo("llama"), "--task", "preference", "--data", pairs, "--json").json["score"] is not None
    chat = tmp_path / "chat.jsonl"
    chat.write_text(json.dumps({"text": "no pair"}) + "\n")
    result = qlora("eval", trained, "--task", "preference", "--data", chat)
    assert result.code == 2 and "missing field" in result.err


def test_preview_shows_both_sides(zoo: Zoo, pairs: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(dump(recipe_for(zoo("llama"), pairs, tmp_path / "run", "dpo")))
    (row,) = qlora("preview", path, "-n", 1, "--json").json["rows"]
    assert [answer["role"] for answer in row["answers"]] == ["chosen", "rejected"]
    assert row["answers"][0]["context_ids"] == row["answers"][1]["context_ids"]
    checked = qlora("check", path, "--json").json
    assert checked["ok"] and checked["data"]["kept"] == PAIRS


def test_preview_marks_the_prompts_that_orpo_trains(zoo: Zoo, pairs: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(dump(recipe_for(zoo("llama"), pairs, tmp_path / "run", "orpo")))
    (row,) = qlora("preview", path, "-n", 1, "--json").json["rows"]
    rejected = row["branches"][0][0]
    assert row["labels"][:rejected] == row["input_ids"][:rejected] and row["segments"][0]["trained"]
    assert [answer["role"] for answer in row["answers"]] == ["chosen", "rejected"]
    assert all(len(answer["context_ids"]) > 1 for answer in row["answers"])  # what is compared: answers alone
    assert any("over the prompts" in note for note in qlora("check", path, "--json").json["data"]["notes"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.kind=sft", "preference pairs (prompt, chosen, rejected), and objective.kind is sft"),
        ("objective.kind=kto", "needs prompt, completion and label"),
        ("objective.reference=nowhere", "nowhere does not exist"),
        ("objective.beta=0", "allowed: a number > 0"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    zoo: Zoo, pairs: Path, tmp_path: Path, override: str, message: str
) -> None:
    path = tmp_path / "recipe.yaml"
    settings = {"model": {"name": str(zoo("llama")), "dtype": "float32"}, "data": {"train": str(pairs)}}
    path.write_text(json.dumps({**settings, "objective": {"kind": "dpo"}, "train": {"output": str(tmp_path / "run")}}))
    result = qlora("train", path, override)
    assert result.code == 2 and message in result.err, result.err
    assert not (tmp_path / "run").exists()


def test_advise_sends_an_untrained_base_to_supervised_fine_tuning(zoo: Zoo, pairs: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(dump(recipe_for(zoo("llama"), pairs, tmp_path / "run", "dpo")))
    advice = qlora("advise", path, "--json").json
    assert advice["verdict"] == "sft" and advice["base"]["loss"] > 4 and 0 <= advice["base"]["likelier"] <= 1
    assert advice["data"]["kept"] == PAIRS and advice["data"]["chosen"] == advice["data"]["rejected"] < PAIRS
    without = qlora("advise", path, "--rows", 0, "--json").json
    assert without["base"] is None and without["verdict"] == "dpo"


DATA = {"chosen": 90, "rejected": 90, "chosen_tokens": 50.0, "rejected_tokens": 50.0}


@pytest.mark.parametrize(
    ("objective", "data", "base", "verdict", "text"),
    [
        ("dpo", {}, None, "dpo", "90 pairs"),
        ("dpo", {"chosen_tokens": 90.0}, None, "simpo", "teach length"),
        ("dpo", {}, {"rows": 9, "loss": 3.0, "likelier": 0.5}, "sft", "does not write such answers yet"),
        ("orpo", {}, {"rows": 9, "loss": 3.0, "likelier": 0.5}, "orpo", "does not write"),
        ("dpo", {}, {"rows": 9, "loss": 1.0, "likelier": 1.0}, "enough", "100% have the likelier"),
        ("kto", {"rejected": 30}, {"rows": 9, "loss": 1.0, "likelier": None}, "kto", "undesirable_weight: 3 balances"),
        ("kto", {"chosen": 30}, None, "kto", "desirable_weight: 3 balances"),
    ],
)
def test_a_method_follows_from_the_figures(
    objective: str, data: dict[str, float], base: dict[str, float] | None, verdict: str, text: str
) -> None:
    result, reasons = judge_answers({"objective": objective, "data": DATA | data, "base": base})
    assert result == verdict and any(text in reason.text for reason in reasons)


def test_training_starts_at_a_reference_in_a_folder(zoo: Zoo, pairs: Path, trained: Path, tmp_path: Path) -> None:
    reference = f"objective.reference={trained}"
    run(recipe_for(zoo("llama"), pairs, tmp_path / "run", "dpo", reference, "train.max_steps=2"))
    first, last = metrics(tmp_path / "run")
    assert first["loss"] == pytest.approx(0.6931, abs=1e-4) and first["margin"] == pytest.approx(0, abs=1e-5)
    assert last["margin"] > 0
    before, after = adapter_tensors(trained), adapter_tensors(tmp_path / "run")
    moved = max(float((before[name] - after[name]).abs().max()) for name in before)
    assert 0 < moved < 0.02 and all(torch.isfinite(value).all() for value in after.values())


def test_a_reference_of_another_base_or_rank_is_refused(zoo: Zoo, pairs: Path, trained: Path, tmp_path: Path) -> None:
    reference = f"objective.reference={trained}"
    with pytest.raises(AdapterError, match="was trained on other weights") as error:
        run(recipe_for(zoo("mistral"), pairs, tmp_path / "run", "dpo", reference))
    assert "load_base" not in [entry.name for entry in error.traceback]  # before a weight is loaded
    with pytest.raises(AdapterError, match=r"training starts at the reference, but .* rank 8, the reference's 4"):
        run(recipe_for(zoo("llama"), pairs, tmp_path / "run", "dpo", reference, "adapter.rank=8", "adapter.alpha=16"))
