"""A run is found from any folder; a base model that is gone is reported where it is named, with what to do."""

import os
from pathlib import Path

import pytest

from qlora.errors import AdapterError, InputError, RecipeError
from qlora.runs.find_run import find_adapter, find_run, require_examples
from qlora.runs.relative_paths import folder_of

RECIPE = """\
model: base model/
data:
  train: [data/*.jsonl, {path: data}]
  eval: data/a [1].jsonl
train: {output: runs/a}
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project folder with a base model, data and a run that was trained in it with relative paths."""
    project = tmp_path / "my project"
    for name in ("base model/config.json", "data/b.jsonl", "data/a [1].jsonl"):
        write(project / name, "{}\n")
    write(project / "base model/model.safetensors", "\x02" + 7 * "\0" + "{}")  # without a tensor
    for name in ("run.json", "adapter_model.safetensors"):
        write(project / "runs/a" / name, "{}\n")
    write(project / "runs/a/adapter_config.json", '{"base_model_name_or_path": "base model/"}')
    write(project / "runs/a/recipe.yaml", RECIPE)
    return project


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_run_opens_from_any_folder(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for here, run in ((project / "runs", "a"), (elsewhere, "../my project/runs/a"), (tmp_path, project / "runs/a")):
        monkeypatch.chdir(here)
        lines: list[str] = []
        files = find_run(str(run), None, lines.append)
        assert files.recipe.model.name == str(project / "base model/")
        sources = [source.path for source in (*files.recipe.data.train, *(files.recipe.data.eval or ()))]
        assert sources == [str(project / "data" / name) for name in ("*.jsonl", "", "a [1].jsonl")]
        require_examples(files.recipe, None)
        assert lines == [
            f"{run}: trained in another folder than this; relative paths of its recipe are read from {project}"
        ]


def test_in_its_own_folder_a_run_keeps_its_paths(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    lines: list[str] = []
    assert find_run("runs/a", None, lines.append).recipe.model.name == "base model/"
    assert find_adapter("runs/a", lines.append)[0] == Path("runs/a")
    assert lines == []


def test_a_run_behind_a_link_opens_from_any_folder(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "large disk").mkdir()
    (project / "runs/a").rename(tmp_path / "large disk/a")
    os.symlink(tmp_path / "large disk/a", project / "runs/a")
    monkeypatch.chdir(tmp_path)
    assert find_run("my project/runs/a").recipe.model.name == str(project / "base model/")


def test_an_adapter_folder_finds_its_relative_base(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "runs/a/recipe.yaml").unlink()
    monkeypatch.chdir("/")
    lines: list[str] = []
    assert find_run(str(project / "runs/a"), None, lines.append).recipe.model.name == str(project / "base model")
    assert "base_model_name_or_path: 'base model/'" in lines[0] and str(project) in lines[0]


def test_a_base_that_is_gone_is_reported_at_the_line_that_names_it(project: Path, tmp_path: Path) -> None:
    (project / "base model").rename(tmp_path / "moved")
    with pytest.raises(RecipeError) as caught:
        find_run(str(project / "runs/a"))
    where = f"{project}/runs/a/recipe.yaml:1: model: base model does not exist"
    assert str(caught.value).startswith(where) and str(Path.cwd()) in str(caught.value)
    assert "write its path there, or run the command where the run was trained" in str(caught.value)
    assert find_adapter(str(project / "runs/a"))[0] == project / "runs/a"  # inspect needs no base
    (project / "runs/a/recipe.yaml").unlink()
    with pytest.raises(AdapterError) as caught:
        find_run(str(project / "runs/a"))
    assert "adapter_config.json: base_model_name_or_path: base model does not exist" in str(caught.value)
    assert f"MODEL --adapter {project}/runs/a" in str(caught.value)


def test_missing_data_is_reported_with_the_option_that_names_other_data(project: Path) -> None:
    (project / "data/b.jsonl").unlink()
    (project / "data/a [1].jsonl").unlink()
    (project / "data").rmdir()
    recipe = find_run(str(project / "runs/a")).recipe
    with pytest.raises(InputError, match=r"(?s)data\.train: data/.*--data names others"):
        require_examples(recipe, None)


@pytest.mark.parametrize("path", ["/absolute", "*.jsonl", "**/x.jsonl", "no-user/no-model", "gone.jsonl"])
def test_other_paths_are_left_as_they_are(project: Path, path: str) -> None:
    assert folder_of(path, project / "runs/a") is None
