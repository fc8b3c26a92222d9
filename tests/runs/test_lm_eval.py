"""`qlora eval --lm-eval` with the real package: log-likelihoods of `qlora eval`, answers of generate, local tasks."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.command_line import qlora
from support.small_runs import WORDS, recipe_of, run, write_records

from qlora.runs.benchmark_results import read_results
from qlora.runs.load_run import load_run

MISSING = "lm-evaluation-harness is not installed: pip install 'qlora[lm-eval]'"
Zoo = Callable[..., Path]
ROWS = [{"question": f"{a} {b}", "answer": f" {c}"} for a, b, c in zip(WORDS, WORDS[1:], WORDS[2:], strict=False)]
SOURCE = (
    "dataset_path: json\ndataset_kwargs: {data_files: {test: ROWS}}\ntest_split: test\ndoc_to_text: '{{question}}'\n"
)
TASKS = {
    "own_choice": "output_type: multiple_choice\ndoc_to_choice: [' red', ' green', ' blue']\ndoc_to_target: 0\n"
    "metric_list: [{metric: acc}]\n",
    "own_answer": "output_type: generate_until\ndoc_to_target: '{{answer}}'\n"
    "generation_kwargs: {until: [' '], max_gen_toks: 5}\nmetric_list: [{metric: exact_match}]\n",
}


@pytest.fixture(scope="module")
def trained(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness")
    run(recipe_of(zoo("llama"), write_records(folder / "records.jsonl", 8), folder / "run", "train.max_steps=2"))
    return folder / "run"


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, text in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{SOURCE.replace('ROWS', str(rows))}{text}")
    return tmp_path


def test_options_that_can_not_work_are_refused(trained: Path, tmp_path: Path) -> None:
    result = qlora("eval", trained, "--limit", 3)
    assert result.code == 2 and "--limit: has no effect without --lm-eval" in result.err
    result = qlora("eval", trained, "--lm-eval", "gsm8k", "--include-path", tmp_path / "none")
    assert result.code == 2 and "is no folder" in result.err


def test_local_tasks_run_and_are_kept(trained: Path, tasks: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install lm-eval")
    names = ",".join(TASKS)
    result = qlora("eval", trained, "--lm-eval", names, "--include-path", tasks, "--limit", 4, "--json")
    assert result.code == 0, result.err
    output = json.loads(result.out)
    assert output["rows"] == 8 and set(output["tasks"]) == set(TASKS)
    assert 0 <= output["tasks"]["own_choice"]["metrics"]["acc"] <= 1
    assert read_results(trained).keys() == TASKS.keys()
    assert "own_choice, acc" in (trained / "report.html").read_text()
    result = qlora("eval", trained, "--lm-eval", "own_chioce", "--include-path", tasks)
    assert result.code == 2 and "Did you mean own_choice" in result.err and len(result.err) < 2000


def test_log_likelihoods_and_answers_are_those_of_qlora(trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install lm-eval")
    from lm_eval.api.instance import Instance

    from qlora.model.generate_tokens import generate
    from qlora.runs.evaluate import evaluate_run
    from qlora.runs.harness_model import HarnessModel

    loaded = load_run(str(trained))
    model = HarnessModel(loaded, lambda line: None)
    pairs = [(row["question"], row["answer"]) for row in ROWS]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    scores = model.loglikelihood(requests)
    for (context, continuation), (score, _) in zip(pairs, scores, strict=True):
        before, whole = (model.tok_encode(text) for text in (context, context + continuation))
        file = tmp_path / "row.jsonl"
        labels = [-100] * len(before) + whole[len(before) :]
        file.write_text(json.dumps({"input_ids": whole, "labels": labels}) + "\n")
        result = evaluate_run(loaded, str(file), "loss")
        assert score == pytest.approx(-result["loss"] * result["tokens"], abs=1e-5)
    rolled = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("red green",), 0)])
    ids = model.tok_encode("red green", False)
    file.write_text(json.dumps({"input_ids": [model.prefix_token_id, *ids], "labels": [-100, *ids]}) + "\n")
    result = evaluate_run(loaded, str(file), "loss")
    assert rolled[0] == pytest.approx(-result["loss"] * result["tokens"], abs=1e-5)

    options = {"until": ["e"], "max_gen_toks": 6}
    asked = [Instance("generate_until", {}, (context, options), index) for index, (context, _) in enumerate(pairs)]
    texts = [loaded.base.tokenizer.decode(ids, skip_special_tokens=True) for ids in generate(
        loaded.base, [model.tok_encode(context) for context, _ in pairs], 6)]  # fmt: skip
    assert model.generate_until(asked) == [text.partition("e")[0] for text in texts]


def test_conversations_are_rendered_as_in_training(trained: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install lm-eval")
    from qlora.data.types import Message
    from qlora.runs.harness_model import HarnessModel

    loaded = load_run(str(trained))
    model = HarnessModel(loaded, lambda line: None)
    text = model.apply_chat_template([{"role": "user", "content": "one two"}])
    assert model.tok_encode(text) == loaded.encoder.prompt_ids([Message("user", "one two")])
