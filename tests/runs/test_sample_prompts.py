"""train.sample_prompts: answered at each evaluation, the base's beside once; the run is the same without."""

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from support.small_runs import differing_tensors, metrics, recipe_of, run, write_records
from support.stopped_runs import signal_in_step

from qlora.adapters.switch import disable_adapters
from qlora.errors import RecipeError, Stopped
from qlora.model.generate_tokens import generate
from qlora.recipe.check_paths import require_paths
from qlora.recipe.recipe import Recipe
from qlora.runs import write_artifacts
from qlora.runs.load_run import LoadedRun, load_run
from qlora.runs.prompts import read_prompts
from qlora.runs.report.prompt_answers import prompt_answers
from qlora.runs.report.run_data import RunData
from qlora.runs.sample_prompts import prompt_answerer
from qlora.training.exact_match import text_of
from qlora.training.signals import StopSignal

Zoo = Callable[..., Path]
PROMPTS = ("one two", "red")
EVALUATIONS = (
    "train.sample_prompts=[one two, red]",
    "train.eval_every=2",
    "data.eval_fraction=0.2",
    "train.max_steps=4",
)


def recipe(zoo: Zoo, folder: Path, name: str, *overrides: str) -> Recipe:
    data = folder / "records.jsonl"
    if not data.exists():
        write_records(data, 10)
    return recipe_of(zoo("llama"), data, folder / name, "optim.learning_rate=0.05", *overrides)


@pytest.fixture(scope="module")
def folder(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with prompts, and the same run without them."""
    folder = tmp_path_factory.mktemp("prompts")
    run(recipe(zoo, folder, "with", *EVALUATIONS))
    run(recipe(zoo, folder, "without", *EVALUATIONS, "train.sample_prompts=[]"))
    return folder


def texts(loaded: LoadedRun) -> list[str]:
    ids = [loaded.encoder.prompt_ids(read_prompts(prompt)[0][1]) for prompt in PROMPTS]
    return [
        text_of(answer, loaded.base.tokenizer) for answer in generate(loaded.base, ids, write_artifacts.SAMPLE_TOKENS)
    ]


def test_each_evaluation_has_the_answers_and_the_first_one_the_bases(folder: Path) -> None:
    lines = metrics(folder / "with", "eval")
    assert [line["step"] for line in lines] == [0, 2, 4]
    assert all([answer["prompt"] for answer in line["answers"]] == [*PROMPTS] for line in lines)
    loaded = load_run(str(folder / "with"))
    assert [answer["answer"] for answer in lines[-1]["answers"]] == texts(loaded)
    with disable_adapters(loaded.base.model):
        base = texts(loaded)
    assert [answer["base"] for answer in lines[0]["answers"]] == base != texts(loaded)
    assert not any("base" in answer for line in lines[1:] for answer in line["answers"])
    page = (folder / "with" / "report.html").read_text()
    assert "Answers during training" in page and "step 2</h4>" in page and ">base</h4>" in page


def test_the_bases_answers_are_without_the_adapter(folder: Path) -> None:
    """At the start of a run both are the same, so that only a trained adapter shows which one answered."""
    loaded = load_run(str(folder / "with"))
    answer = prompt_answerer(loaded.recipe, loaded.base, print, StopSignal())
    assert answer is not None
    rows, with_adapter = answer(True), texts(loaded)
    with disable_adapters(loaded.base.model):
        base = texts(loaded)
    assert [row["answer"] for row in rows] == with_adapter
    assert [row["base"] for row in rows] == base != with_adapter


def test_the_run_is_the_same_without_prompts(folder: Path) -> None:
    assert differing_tensors(folder / "with", folder / "without") == []
    lines = [{k: v for k, v in line.items() if k != "answers"} for line in metrics(folder / "with", "eval")]
    assert lines == metrics(folder / "without", "eval")


def test_a_resumed_run_has_the_same_answers(zoo: Zoo, folder: Path) -> None:
    stopped = recipe(zoo, folder, "stopped", *EVALUATIONS)
    with signal_in_step(3, signal.SIGTERM), pytest.raises(Stopped):
        run(stopped)
    run(stopped)
    assert metrics(folder / "stopped", "eval") == metrics(folder / "with", "eval")
    assert differing_tensors(folder / "stopped", folder / "with") == []


def test_a_page_shows_evaluations_evenly_over_the_run() -> None:
    answers = [{"prompt": "one", "answer": "two"}]
    metrics = [{"event": "eval", "step": step, "answers": answers} for step in range(11)]
    page = str(prompt_answers([RunData("run", {}, metrics)]))
    assert re.findall(r"step (\d+)<", page) == ["0", "2", "5", "8", "10"]


def test_a_file_of_prompts_is_checked_before_anything_is_loaded(zoo: Zoo, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    settings = recipe(zoo, tmp_path, "run", f"train.sample_prompts={file}", "data.eval_fraction=0.2")
    with pytest.raises(RecipeError, match=r"train.sample_prompts: .*prompts.jsonl: no such file"):
        require_paths(settings, ("train.sample_prompts",))
    file.write_text(json.dumps({"prompt": "one"}) + "\n" + json.dumps({"text": "two"}) + "\n")
    with pytest.raises(RecipeError, match=r"train.sample_prompts: .*:2: found text; a line needs `prompt`"):
        require_paths(settings, ("train.sample_prompts",))


def test_prompts_without_held_out_examples_are_refused(zoo: Zoo, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"train.sample_prompts: has no effect: there is no evaluation data"):
        recipe(zoo, tmp_path, "run", "train.sample_prompts=[hello]")
