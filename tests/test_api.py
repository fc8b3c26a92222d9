"""The Python interface: the code blocks of docs/api.md run unchanged, and importing it loads nothing heavy."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from support.documents import ROOT, fences

import qlora
from qlora.errors import InputError, RecipeError

BLOCKS = [fence for fence in fences(ROOT / "docs" / "api.md") if fence.words == ("python",)]
DEMO = ROOT / "qlora" / "demo"
RECIPE = """\
model: {{name: {base}, dtype: float32}}
data: {{train: {folder}/train.jsonl, eval: {folder}/eval.jsonl, max_length: 128, packing: false}}
adapter: {{targets: [q_proj]}}
optim: {{kind: adamw}}
train: {{output: runs/my, micro_batch: 2, global_batch: 2}}
"""


def write_recipe(folder: Path) -> Path:
    """my.yaml, which trains the demo's base model on a part of its data."""
    for name, count in (("train", 40), ("eval", 6)):
        lines = (DEMO / "data" / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:count]))
    (folder / "my.yaml").write_text(RECIPE.format(base=DEMO / "base", folder=folder))
    return folder / "my.yaml"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The output of each block of the page; the blocks run in order in one folder, each with its own globals."""
    folder = tmp_path_factory.mktemp("notebook")
    write_recipe(folder)
    outputs = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in BLOCKS:
            lines: list[str] = []
            exec(block.text, {"print": lambda *values, lines=lines: lines.append(" ".join(map(str, values)))})
            outputs[block.where] = "\n".join(lines)
        outputs["folder"] = str(folder)
    return outputs


def test_every_block_of_the_page_runs_and_prints_something(outputs: dict[str, str]) -> None:
    assert len(BLOCKS) == 4 and all(outputs[block.where] for block in BLOCKS)
    trained, planned, generated, exported = (outputs[block.where] for block in BLOCKS)
    loss, eval_loss, report = trained.split()
    assert float(loss) > 0 and float(eval_loss) > 0 and Path(outputs["folder"], report).is_file()
    assert "24.00 GiB" in planned and "fits (predicted)" in planned
    assert generated.count("\n") >= 1 and generated.splitlines()[-1].startswith("[")
    assert (
        float(exported.split()[0]) < 1e-6
    )  # nats per token: merged in float32 from the dequantized weights of training


def test_the_block_of_the_readme_runs_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = (fence.text for fence in fences(ROOT / "README.md") if fence.words == ("python",))
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path)
    recipe.write_text(recipe.read_text().replace("train: {output", "train: {max_steps: 2, output"))
    lines: list[str] = []
    exec(block, {"print": lines.append})
    assert len(lines) == 1 and isinstance(lines[0], str)


def test_a_block_has_at_most_three_lines_after_the_import() -> None:
    for block in BLOCKS:
        assert len([line for line in block.text.splitlines() if line and not line.startswith("import")]) <= 3


def test_importing_it_loads_nothing_heavy() -> None:
    code = "import sys, qlora; print({'torch', 'transformers', 'numpy', 'yaml'} & {*sys.modules}, qlora.__all__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.startswith("set()")


def test_the_functions_are_not_shadowed_by_packages() -> None:
    import qlora.exporters
    import qlora.training

    assert [*inspect.signature(qlora.train).parameters] == ["recipe", "quiet"]
    assert [*inspect.signature(qlora.export).parameters][:3] == ["run", "out", "to"]


@pytest.mark.parametrize("name", [name for name in qlora.__all__ if name[0].islower() and name != "errors"])
def test_every_function_is_documented_with_its_errors_and_typed(name: str) -> None:
    from qlora import api

    function = getattr(api, name)
    assert callable(getattr(qlora, name)) and name in dir(qlora)
    assert "Error" in function.__doc__ or "DoesNotFit" in function.__doc__
    parameters = inspect.signature(function).parameters.values()
    assert all(parameter.annotation is not inspect.Parameter.empty for parameter in parameters)


def test_errors_are_those_of_the_command_line(tmp_path: Path) -> None:
    assert issubclass(qlora.errors.RecipeError, InputError)
    with pytest.raises(RecipeError, match="Did you mean"):
        qlora.load_recipe({"model": "a/b", "data": {"train": "x.jsonl"}}, "adapter.rnak=3")
    with pytest.raises(InputError, match="Did you mean 'merged'"):
        qlora.export(tmp_path, tmp_path / "out", to="mergd")  # type: ignore[call-overload]
    with pytest.raises(InputError, match="max_new_tokens"):
        qlora.generate(tmp_path, "x", max_new_tokens=0)
    with pytest.raises(AttributeError, match="load_recipe"):
        qlora.load_receipt  # type: ignore[attr-defined]  # noqa: B018


def test_a_plan_is_the_one_of_the_command_line_on_several_gpus_too(tmp_path: Path) -> None:
    from support.command_line import qlora as command

    write_recipe(tmp_path)
    for gpus in (1, 2):
        result = command("plan", tmp_path / "my.yaml", "--gpu", "8GiB", "--gpus", gpus, "--ram", "64GiB", "--json").json
        assert qlora.plan(tmp_path / "my.yaml", gpu="8GiB", gpus=gpus, ram="64GiB").peak_bytes == result["peak_bytes"]
