"""How a base is stored when it is opened: as trained, as exported, or as `--quant` says."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.command_line import qlora
from support.small_runs import recipe_of, run, write_records

from qlora.model.model_folder import is_export
from qlora.runs.load_run import load_run

Zoo = Callable[..., Path]


@pytest.fixture(scope="module")
def folders(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and its merged model."""
    folder = tmp_path_factory.mktemp("storage")
    data = write_records(folder / "records.jsonl", 8)
    run(recipe_of(zoo("llama"), data, folder / "run", "data.eval_fraction=0.25", "train.max_steps=2"))
    assert qlora("export", folder / "run", folder / "merged", "--to", "merged", "--rows", 0).code == 0
    return folder


def test_an_exported_model_is_run_as_written(folders: Path, zoo: Zoo) -> None:
    assert is_export(folders / "merged") and not is_export(zoo("llama")) and not is_export(folders / "run")
    lines: list[str] = []
    merged = load_run(str(folders / "merged"), log=lines.append)
    assert merged.recipe.quant.kind == "dense"
    assert any("runs in the dtype of its files; --quant nf4 quantizes it" in line for line in lines)
    assert load_run(str(zoo("llama"))).recipe.quant.kind == "nf4"


def test_its_answers_are_those_of_the_run(folders: Path) -> None:
    data = ("--data", folders / "records.jsonl", "--json")
    loss = {
        (name, *options): qlora("eval", folders / name, *options, *data).json["loss"]
        for name, options in (
            ("run", ()),
            ("merged", ()),
            ("merged", ("--quant", "nf4")),
            ("run", ("--quant", "dense")),
        )
    }
    assert loss["run",] == pytest.approx(loss["merged",], abs=1e-5)
    assert abs(loss["merged", "--quant", "nf4"] - loss["merged",]) > 1e-4
    assert abs(loss["run", "--quant", "dense"] - loss["run",]) > 1e-4
    rows = [
        qlora("generate", folders / name, "red sun", "--json", "--max-new-tokens", 8).json["rows"]
        for name in ("run", "merged")
    ]
    assert rows[0] == rows[1]


def test_the_16_bit_base_is_what_an_exported_adapter_is_measured_on(folders: Path) -> None:
    answer = qlora("export", folders / "run", folders / "adapter", "--to", "adapter", "--json").json
    served = answer["served"]
    assert answer["agreement"] == served and served["rows"] == 2 and served["mean_kl"] > 0
    dense = qlora("eval", folders / "run", "--quant", "dense", "--json").json
    assert served["written_loss"] == pytest.approx(dense["loss"], abs=1e-4)
    assert json.loads((folders / "adapter" / "certificate.json").read_text())["mean_kl"] == served["mean_kl"]
    result = qlora("export", folders / "run", folders / "none", "--to", "adapter", "--max-kl", served["mean_kl"] / 2)
    assert result.code == 1 and "16-bit base" in result.err and not (folders / "none").exists()


def test_an_unknown_kind_is_refused(folders: Path) -> None:
    for command in (("eval",), ("generate",), ("chat",)):
        prompt = ["hello"] if command == ("generate",) else []
        result = qlora(*command, folders / "run", *prompt, "--quant", "nf5")
        assert result.code == 2 and "Did you mean 'nf4'? Known: dense, fp4, nf4." in result.err
