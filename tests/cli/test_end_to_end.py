"""The walk through the whole house, by its door: train, eval, generate, export, and what each leaves and answers."""

import hashlib
import io
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open
from support.command_line import Said, qlora
from support.small_runs import differing, metrics, write_rows

from qlora.model.download import TOKENIZER_FILES
from qlora.recipe.recipe import read

Zoo = Callable[..., Path]
pytestmark = pytest.mark.xdist_group("walk")

RECIPE = """\
model: {{name: {model}, dtype: float32}}
adapter: {{rank: 4}}
data: {{train: {data}, eval_fraction: 0.25, max_length: 200}}
optim: {{kind: adamw, learning_rate: 5e-3}}
train: {{output: {output}, max_steps: 4, global_batch: 4, save_every: 2}}
"""


class Walk:
    """A finished run in `folder/run`, what training it said, and the pieces it was made of."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.folder, self.run = model, folder, folder / "run"
        self.data = write_rows(folder / "rows.jsonl", 16)
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(RECIPE.format(model=model, data=self.data, output=self.run))
        self.said = qlora("train", self.recipe, "train.epochs=null", "--adapter.alpha", "8", "--optim.warmup=1")

    @property
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.run / "run.json").read_text())


@pytest.fixture(scope="module")
def walk(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Walk:
    return Walk(zoo("llama-tied-bias"), tmp_path_factory.mktemp("walk"))


# ---- what a run leaves behind


def test_training_ends_well_and_says_so_to_people_only(walk: Walk) -> None:
    assert walk.said.code == 0 and walk.said.out == ""
    assert "trainable parameters" in walk.said.err and "done: 4 steps" in walk.said.err
    assert "\x1b[" not in walk.said.err  # no colours in a pipe


def test_the_folder_holds_what_the_contract_says(walk: Walk) -> None:
    files = {path.name for path in walk.run.iterdir()}
    tokenizer = {name for name in TOKENIZER_FILES if (walk.model / name).is_file()}
    expected = {
        "adapter_model.safetensors", "adapter_config.json", "recipe.yaml", "run.json", "metrics.jsonl", "report.html",
        "README.md", "checkpoint-000002", "checkpoint-000004",
    }  # fmt: skip
    assert files == expected | tokenizer
    for name in tokenizer:
        assert (walk.run / name).read_bytes() == (walk.model / name).read_bytes()
    assert not list(walk.run.rglob(".partial-*"))


def test_a_checkpoint_is_an_adapter_folder_with_a_manifest_of_all_its_files(walk: Walk) -> None:
    for step in (2, 4):
        folder = walk.run / f"checkpoint-{step:06d}"
        manifest = json.loads((folder / "manifest.json").read_text())
        others = {path.name for path in folder.iterdir()} - {"manifest.json"}
        assert manifest["files"] == {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in others}
        assert {"adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors"} <= others
    assert differing(walk.run, walk.run / "checkpoint-000004") == []


def test_the_manifest_says_what_happened(walk: Walk) -> None:
    found = walk.manifest
    assert {"base", "data", "result", "memory", "seconds", "files"} <= found.keys()
    assert found["base"]["name"] == str(walk.model) and re.fullmatch("[0-9a-f]{64}", found["base"]["sha256"])
    assert "revision" in found["base"] and len(found["base"]["quantized"]) == 14
    assert all(each["kind"] == "nf4" and each["block"] == 64 for each in found["base"]["quantized"].values())
    assert found["data"]["rows"] == 16 and found["data"]["kept"] == 16 and found["data"]["dropped"] == {}
    assert re.fullmatch("[0-9a-f]{64}", found["data"]["sha256"])
    result = found["result"]
    assert result["steps"] == 4 and math.isfinite(result["loss"]) and math.isfinite(result["eval_loss"])
    assert {"planned_bytes", "peak_bytes"} <= found["memory"].keys() and found["memory"]["peak_bytes"] > 10**6
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert found["files"][name] == hashlib.sha256((walk.run / name).read_bytes()).hexdigest()
    text = json.dumps(found)
    for library in ("torch", "transformers", "bitsandbytes", "accelerate", "python"):
        assert library in text
    with safe_open(walk.run / "adapter_model.safetensors", "pt") as file:
        assert found["base"]["sha256"] in file.metadata().values()


def test_metrics_have_a_line_a_step_and_an_evaluation_at_both_ends(walk: Walk) -> None:
    lines = [json.loads(line) for line in (walk.run / "metrics.jsonl").read_text().splitlines()]
    keys = {"step", "epoch", "loss", "learning_rate", "grad_norm", "trained_tokens", "tokens_per_second", "peak_bytes"}
    trained = [line for line in lines if line["event"] == "train"]
    evaluated = [line for line in lines if line["event"] == "eval"]
    assert [line["step"] for line in trained] == [1, 2, 3, 4] and all(keys <= line.keys() for line in trained)
    assert [line["step"] for line in evaluated] == [0, 4] and all("eval_loss" in line for line in evaluated)
    assert evaluated[1]["eval_loss"] < evaluated[0]["eval_loss"]
    assert len(lines) == len(trained) + len(evaluated)
    assert trained[1]["loss"] != round(trained[1]["loss"], 6)  # full precision


def test_the_recipe_is_written_out_with_every_default_and_the_overrides(walk: Walk) -> None:
    text = (walk.run / "recipe.yaml").read_text()
    again, notes = read(walk.run / "recipe.yaml")
    assert notes == [] and again.adapter.alpha == 8 and again.optim.warmup == 1 and again.train.max_steps == 4
    for section in type(again).model_fields:
        for key in type(getattr(again, section)).model_fields:
            assert key in yaml.safe_load(text)[section], f"{section}.{key}"


def test_report_and_card_are_whole_and_need_nothing_else(walk: Walk) -> None:
    page = (walk.run / "report.html").read_text()
    assert page.lower().startswith("<!doctype html") and "<svg" in page and page.rstrip().endswith("</html>")
    assert not re.search(r"<script[^>]+src|<link[^>]+href|<img[^>]+src=.http|@import|url\(http", page)
    card = (walk.run / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "peft" and walk.manifest["base"]["sha256"] in card
    assert str(walk.folder) not in card and str(walk.model) not in card  # a card is for others


def test_the_same_recipe_again_is_the_same_adapter(walk: Walk, tmp_path: Path) -> None:
    said = qlora("train", walk.run / "recipe.yaml", f"train.output={tmp_path / 'again'}")
    assert said.code == 0 and differing(walk.run, tmp_path / "again") == []
    assert metrics(walk.run) == metrics(tmp_path / "again")


# ---- what the verbs answer


def test_eval_measures_what_training_measured(walk: Walk) -> None:
    found = qlora("eval", walk.run, "--json").json
    assert {"task", "loss", "perplexity", "score", "rows", "tokens"} <= found.keys()
    assert found["task"] == "loss" and found["rows"] == 4
    assert math.isclose(found["loss"], walk.manifest["result"]["eval_loss"], rel_tol=1e-6)
    assert math.isclose(found["perplexity"], math.exp(found["loss"]), rel_tol=1e-6)
    at_two = qlora("eval", walk.run / "checkpoint-000002", "--json").json
    assert at_two["loss"] != found["loss"]


def test_eval_of_a_plain_model_is_eval_of_the_base(walk: Walk) -> None:
    before = qlora("eval", walk.model, "--data", walk.data, "--json").json
    after = qlora("eval", walk.model, "--adapter", walk.run, "--data", walk.data, "--json").json
    same = qlora("eval", walk.run, "--data", walk.data, "--json").json
    assert before["rows"] == after["rows"] == 16 and after["loss"] < before["loss"]
    assert after["loss"] == same["loss"]


def test_exact_match_is_a_share(walk: Walk) -> None:
    found = qlora("eval", walk.run, "--task", "exact-match", "--json").json
    assert found["task"] == "exact-match" and 0 <= found["score"] <= 1


def test_generate_answers_a_text_a_file_and_stdin(walk: Walk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = qlora("generate", walk.run, "one two", "--max-new-tokens", 5, "--json").json["rows"]
    assert {"prompt", "input_ids", "output_ids", "text"} <= row.keys() and row["prompt"] == "one two"
    assert 1 <= len(row["output_ids"]) <= 5
    file = tmp_path / "prompts.jsonl"
    turns = [{"role": "user", "content": "one two"}]
    file.write_text(json.dumps({"prompt": "a longer one than the others"}) + "\n" + json.dumps({"messages": turns}))
    longer, same = qlora("generate", walk.run, file, "--max-new-tokens", 5, "--json").json["rows"]
    assert same["input_ids"] == row["input_ids"] and same["output_ids"] == row["output_ids"]  # in any batch
    assert longer["input_ids"] != row["input_ids"]
    monkeypatch.setattr("sys.stdin", io.StringIO("one two\n"))
    (typed,) = qlora("generate", walk.run, "-", "--max-new-tokens", 5, "--json").json["rows"]
    assert typed["output_ids"] == row["output_ids"]
    plain = qlora("generate", walk.run, "one two", "--max-new-tokens", 5)
    assert plain.code == 0 and plain.out.rstrip("\n") == row["text"]


def test_export_answers_where_and_how_close(walk: Walk, tmp_path: Path) -> None:
    merged = qlora("export", walk.run, tmp_path / "merged", "--to", "merged", "--json").json
    assert {"path", "base", "dtype", "bytes", "agreement"} <= merged.keys()
    assert {"mean_kl", "top1", "max_logit_difference", "rows"} <= merged["agreement"].keys()
    assert merged["path"] == str(tmp_path / "merged") and merged["base"] == "dequantized"
    assert merged["dtype"] == "float32" and merged["agreement"]["top1"] == 1.0 and merged["agreement"]["rows"] == 4
    adapter = qlora("export", walk.run, tmp_path / "adapter", "--to", "adapter", "--json").json
    assert adapter["agreement"] is None and differing(walk.run, tmp_path / "adapter") == []
    without = qlora("export", walk.run, tmp_path / "plain", "--to", "merged", "--rows", 0, "--json").json
    assert without["agreement"] is None and without["bytes"] == merged["bytes"]


def test_check_plan_preview_and_doctor_answer_in_json(walk: Walk) -> None:
    check = qlora("check", walk.recipe, "--json").json
    assert {"ok", "problems", "warnings", "data", "memory"} <= check.keys() and check["ok"] is True
    assert {"rows", "kept", "dropped", "tokens", "trained_tokens"} <= check["data"].keys()
    plan = qlora("plan", walk.recipe, "--gpu", "24GiB", "--json").json
    keys = {"model", "parameters", "trainable_parameters", "gpu_bytes", "peak_bytes", "owners", "fits", "choice"}
    assert keys | {"host_bytes", "compare"} <= plan.keys() and plan["gpu_bytes"] == 24 * 2**30
    assert {"recompute", "offload_activations", "weights", "micro_batch"} <= plan["choice"].keys()
    assert {"full_finetune_bytes", "lora_16bit_bytes", "qlora_bytes"} <= plan["compare"].keys()
    assert plan["trainable_parameters"] == walk.manifest["adapter"]["trainable_parameters"]
    assert plan["parameters"] == walk.manifest["adapter"]["parameters"]
    rows = qlora("preview", walk.recipe, "-n", 2, "--json").json["rows"]
    assert len(rows) == 2 and all({"where", "input_ids", "labels", "segments"} <= row.keys() for row in rows)
    assert all(re.fullmatch(rf"{walk.data}:\d+", row["where"]) for row in rows)
    assert all({"text", "trained"} <= segment.keys() for row in rows for segment in row["segments"])
    doctor = qlora("doctor", "--json").json
    keys = {"python", "torch", "bitsandbytes", "accelerate", "transformers", "devices", "problems"}
    assert keys <= doctor.keys()


# ---- bad input: one clear message, exit code 2, nothing half-written


def refused(said: Said, *named: str, code: int = 2) -> None:
    assert said.code == code, said.err
    assert said.out == "" and "Traceback" not in said.err
    last = said.err.strip().splitlines()[-1]
    assert said.err.count("error: ") == 1, said.err
    for word in named:
        assert word in said.err, (word, said.err)
    assert len(last) < 700


BAD_RECIPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "a misspelt key": (("optim.lerning_rate=1e-4",), ("lerning_rate", "learning_rate")),
    "a misspelt section": (("optm.learning_rate=1e-4",), ("optm", "optim")),
    "a wrong type": (("train.seed=soon",), ("train.seed", "soon")),
    "rank 0": (("adapter.rank=0",), ("adapter.rank", "0", ">= 1")),
    "an unknown word": (("quant.kind=nf5",), ("quant.kind", "nf5", "nf4")),
    "said twice": (("train.seed=1", "train.seed=2"), ("train.seed",)),
    "a target that matches nothing": (("adapter.targets=[q_prj]",), ("adapter.targets", "q_prj", "q_proj")),
    "a pattern that matches nothing": (("adapter.targets=nothing.*",), ("adapter.targets", "nothing")),
    "no data": (("data.train={folder}/gone.jsonl",), ("gone.jsonl",)),
    "an empty file": (("data.train={folder}/empty.jsonl",), ("empty.jsonl",)),
    "a broken line": (("data.train={folder}/broken.jsonl",), ("broken.jsonl:2",)),
    "rows of no known format": (("data.train={folder}/strange.jsonl",), ("strange.jsonl", "columns")),
    "rows that are all too long": (("data.max_length=3",), ("max_length",)),
    "no model": (("model.name={folder}/gone",), ("gone", "config.json")),
    "a model without safetensors": (("model.name={folder}/pickled",), ("pytorch_model.bin",)),
    "a kind that is not built": (("adapter.kind=full", "quant.kind=dense"), ("full",)),
    "a start with more directions than there are": (("adapter.init=pissa", "adapter.rank=999"), ("999", "pissa")),
    "a checkpoint that is none": (("train.resume={folder}/gone",), ("gone",)),
    "half the gradients of float16": (("model.dtype=float16",), ("model.dtype", "float16")),
    "a template that is not there": (("model.chat_template={folder}/gone.jinja",), ("gone.jinja",)),
    "a template that is damaged": (("model.chat_template={folder}/bad.jinja",), ("bad.jinja",)),
}


@pytest.fixture(scope="module")
def bad(walk: Walk) -> Path:
    """Files that can't be used."""
    (walk.folder / "empty.jsonl").write_text("")
    good = walk.data.read_text().splitlines()
    (walk.folder / "broken.jsonl").write_text("\n".join([good[0], '{"messages": [', *good[1:]]))
    (walk.folder / "strange.jsonl").write_text('{"x": 1}\n{"x": 2}\n')
    (walk.folder / "bad.jinja").write_text("{% for message in messages %}")
    shutil.copytree(walk.model, walk.folder / "pickled")
    (walk.folder / "pickled" / "model.safetensors").rename(walk.folder / "pickled" / "pytorch_model.bin")
    return walk.folder


@pytest.mark.parametrize("case", BAD_RECIPES)
def test_a_recipe_that_cannot_be_meant_is_refused(walk: Walk, bad: Path, case: str, tmp_path: Path) -> None:
    overrides, named = BAD_RECIPES[case]
    given = [override.format(folder=bad) for override in overrides]
    refused(qlora("train", walk.recipe, f"train.output={tmp_path / 'run'}", *given), *named)
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").rglob("*.safetensors"))
    assert not list(tmp_path.rglob(".partial-*"))


def test_a_recipe_that_is_not_there_or_says_nothing_is_refused(walk: Walk, tmp_path: Path) -> None:
    refused(qlora("train", tmp_path / "recipe.yml"), "recipe.yml", "no such file")
    (tmp_path / "empty.yaml").write_text("")
    refused(qlora("train", tmp_path / "empty.yaml"), "empty.yaml")
    (tmp_path / "twice.yaml").write_text(walk.recipe.read_text() + "optim: {learning_rate: 1}\n")
    refused(qlora("train", tmp_path / "twice.yaml"), "twice.yaml:6", "optim")
    (tmp_path / "tabs.yaml").write_text("model:\n\tname: x\n")
    refused(qlora("train", tmp_path / "tabs.yaml"), "tabs.yaml:2")


def test_an_adapter_of_another_base_is_refused_everywhere(walk: Walk, zoo: Zoo, tmp_path: Path) -> None:
    other = zoo("llama-tied-bias", seed=1)
    refused(qlora("eval", other, "--adapter", walk.run, "--data", walk.data), "other weights")
    refused(qlora("generate", other, "hello", "--adapter", f"mine={walk.run}"), "other weights")
    moved = Path(shutil.copytree(walk.run, tmp_path / "run"))
    recipe = (moved / "recipe.yaml").read_text().replace(str(walk.model), str(other))
    (moved / "recipe.yaml").write_text(recipe)
    refused(qlora("eval", moved), "other weights")
    refused(qlora("export", moved, tmp_path / "merged", "--to", "merged"), "other weights")
    assert not (tmp_path / "merged").exists()


def test_a_damaged_run_is_refused_by_the_file(walk: Walk, tmp_path: Path) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        run = Path(shutil.copytree(walk.run, tmp_path / name))
        content = bytearray((run / name).read_bytes())
        content[-20] ^= 1
        (run / name).write_bytes(bytes(content))
        refused(qlora("eval", run), name, "damaged")
        refused(qlora("export", run, tmp_path / "out", "--to", "adapter"), name, "damaged")
    checkpoint = Path(shutil.copytree(walk.run / "checkpoint-000002", tmp_path / "c" / "checkpoint-000002"))
    shutil.copy(walk.run / "recipe.yaml", tmp_path / "c")
    (checkpoint / "manifest.json").unlink()
    refused(qlora("eval", checkpoint), "manifest.json")


def test_an_unfinished_run_names_its_newest_checkpoint(walk: Walk, tmp_path: Path) -> None:
    run = Path(shutil.copytree(walk.run, tmp_path / "run"))
    (run / "adapter_model.safetensors").unlink()
    refused(qlora("eval", run), "not finished", "checkpoint-000004")


BAD_WORDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "no such verb": (("trian",), ("trian",)),
    "no such option": (("eval", "{run}", "--jsn"), ("--jsn",)),
    "no argument": (("train",), ("recipe",)),
    "no such task": (("eval", "{run}", "--task", "los"), ("los", "loss")),
    "rows that offer no choice": (("eval", "{run}", "--task", "choice"), ("letters", "exact-match")),
    "a base beside itself": (("eval", "{model}", "--data", "{data}", "--beside-base"), ("own base",)),
    "no data for a plain model": (("eval", "{model}"), ("--data",)),
    "data that is not there": (("eval", "{run}", "--data", "gone.jsonl"), ("gone.jsonl",)),
    "no such run": (("eval", "./gone"), ("gone",)),
    "no such adapter": (("eval", "{run}", "--adapter", "./gone"), ("gone",)),
    "prompts that are not there": (("generate", "{run}", "gone.jsonl"), ("gone.jsonl",)),
    "no tokens": (("generate", "{run}", "hello", "--max-new-tokens", "0"), ("max-new-tokens",)),
    "no such target": (("export", "{run}", "{out}", "--to", "merge"), ("merge", "merged")),
    "no such base": (("export", "{run}", "{out}", "--to", "merged", "--base", "orginal"), ("orginal", "original")),
    "no such dtype": (("export", "{run}", "{out}", "--to", "merged", "--dtype", "int4"), ("int4", "float32")),
    "a plain model to export": (("export", "{model}", "{out}", "--to", "merged"), ("adapter",)),
    "a folder that is there": (("export", "{run}", "{run}", "--to", "merged"), ("already",)),
    "a card of no size": (("plan", "{recipe}", "--gpu", "big"), ("big",)),
    "rows below zero": (("export", "{run}", "{out}", "--to", "merged", "--rows", "-1"), ("rows",)),
}


@pytest.mark.parametrize("case", BAD_WORDS)
def test_words_that_cannot_be_meant_are_refused(walk: Walk, case: str, tmp_path: Path) -> None:
    words, named = BAD_WORDS[case]
    places = {"run": walk.run, "model": walk.model, "out": tmp_path / "out", "recipe": walk.recipe, "data": walk.data}
    refused(qlora(*(word.format(**places) for word in words)), *named)
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob(".partial-*"))


def test_a_card_that_is_too_small_is_exit_code_3(walk: Walk) -> None:
    said = qlora("plan", walk.recipe, "--gpu", "1KiB", "--json")
    assert said.code == 3 and json.loads(said.out)["fits"] is False
