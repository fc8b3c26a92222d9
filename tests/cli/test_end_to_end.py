"""From training to export on the command line: what a run leaves, and what each command prints."""

import hashlib
import io
import json
import math
import re
from pathlib import Path

import pytest
import yaml
from safetensors import safe_open
from support.command_line import qlora
from support.finished_run import FinishedRun
from support.small_runs import differing_tensors, metrics

from qlora.model.download import TOKENIZER_FILES
from qlora.recipe.recipe import read

pytestmark = pytest.mark.xdist_group("end to end")

# What a run leaves


def test_training_succeeds_and_prints_to_stderr_only(finished: FinishedRun) -> None:
    assert finished.result.code == 0 and finished.result.out == ""
    assert "trainable parameters" in finished.result.err and "done: 4 steps" in finished.result.err
    assert "\x1b[" not in finished.result.err  # no colors in a pipe


def test_the_run_folder_has_the_documented_files(finished: FinishedRun) -> None:
    files = {path.name for path in finished.run.iterdir()}
    tokenizer = {name for name in TOKENIZER_FILES if (finished.model / name).is_file()}
    expected = {
        "adapter_model.safetensors", "adapter_config.json", "recipe.yaml", "run.json", "metrics.jsonl", "report.html",
        "README.md", "checkpoint-000002", "checkpoint-000004",
    }  # fmt: skip
    assert files == expected | tokenizer
    for name in tokenizer:
        assert (finished.run / name).read_bytes() == (finished.model / name).read_bytes()
    assert not list(finished.run.rglob(".partial-*"))


def test_a_checkpoint_is_an_adapter_folder_with_a_manifest(finished: FinishedRun) -> None:
    for step in (2, 4):
        folder = finished.run / f"checkpoint-{step:06d}"
        manifest = json.loads((folder / "manifest.json").read_text())
        others = {path.name for path in folder.iterdir()} - {"manifest.json"}
        assert manifest["files"] == {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in others}
        assert {"adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors"} <= others
    assert differing_tensors(finished.run, finished.run / "checkpoint-000004") == []


def test_the_manifest_describes_the_run(finished: FinishedRun) -> None:
    manifest = finished.manifest
    assert {"base", "data", "result", "memory", "seconds", "files"} <= manifest.keys()
    assert manifest["base"]["name"] == str(finished.model) and re.fullmatch("[0-9a-f]{64}", manifest["base"]["sha256"])
    assert "revision" in manifest["base"] and len(manifest["base"]["quantized"]) == 14
    assert all(m["kind"] == "nf4" and m["block"] == 64 for m in manifest["base"]["quantized"].values())
    assert manifest["data"]["rows"] == 16 and manifest["data"]["kept"] == 16 and manifest["data"]["dropped"] == {}
    assert re.fullmatch("[0-9a-f]{64}", manifest["data"]["sha256"])
    result = manifest["result"]
    assert result["steps"] == 4 and math.isfinite(result["loss"]) and math.isfinite(result["eval_loss"])
    assert {"planned_bytes", "peak_bytes"} <= manifest["memory"].keys() and manifest["memory"]["peak_bytes"] > 10**6
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert manifest["files"][name] == hashlib.sha256((finished.run / name).read_bytes()).hexdigest()
    text = json.dumps(manifest)
    for library in ("torch", "transformers", "bitsandbytes", "accelerate", "python"):
        assert library in text
    with safe_open(finished.run / "adapter_model.safetensors", "pt") as file:
        assert manifest["base"]["sha256"] in file.metadata().values()


def test_metrics_have_a_line_per_step_and_evaluations_at_both_ends(finished: FinishedRun) -> None:
    lines = [json.loads(line) for line in (finished.run / "metrics.jsonl").read_text().splitlines()]
    keys = {"step", "epoch", "loss", "learning_rate", "grad_norm", "trained_tokens", "tokens_per_second", "peak_bytes"}
    steps = [line for line in lines if line["event"] == "train"]
    evaluations = [line for line in lines if line["event"] == "eval"]
    assert [line["step"] for line in steps] == [1, 2, 3, 4] and all(keys <= line.keys() for line in steps)
    assert [line["step"] for line in evaluations] == [0, 4] and all("eval_loss" in line for line in evaluations)
    assert evaluations[1]["eval_loss"] < evaluations[0]["eval_loss"]
    assert len(lines) == len(steps) + len(evaluations)
    assert steps[1]["loss"] != round(steps[1]["loss"], 6)  # full precision


def test_recipe_yaml_has_every_default_and_the_overrides(finished: FinishedRun) -> None:
    text = (finished.run / "recipe.yaml").read_text()
    recipe, notes = read(finished.run / "recipe.yaml")
    assert notes == [] and recipe.adapter.alpha == 8 and recipe.optim.warmup == 1 and recipe.train.max_steps == 4
    for section in type(recipe).model_fields:
        for key in type(getattr(recipe, section)).model_fields:
            assert key in yaml.safe_load(text)[section], f"{section}.{key}"


def test_report_and_model_card_are_complete_and_self_contained(finished: FinishedRun) -> None:
    page = (finished.run / "report.html").read_text()
    assert page.lower().startswith("<!doctype html") and "<svg" in page and page.rstrip().endswith("</html>")
    assert not re.search(r"<script[^>]+src|<link[^>]+href|<img[^>]+src=.http|@import|url\(http", page)
    model_card = (finished.run / "README.md").read_text()
    metadata = yaml.safe_load(model_card.split("---")[1])
    assert metadata["library_name"] == "peft" and finished.manifest["base"]["sha256"] in model_card
    assert str(finished.folder) not in model_card and str(finished.model) not in model_card  # it gets published


def test_the_same_recipe_gives_the_same_adapter(finished: FinishedRun, tmp_path: Path) -> None:
    result = qlora("train", finished.run / "recipe.yaml", f"train.output={tmp_path / 'again'}")
    assert result.code == 0 and differing_tensors(finished.run, tmp_path / "again") == []
    assert metrics(finished.run) == metrics(tmp_path / "again")


# What the commands print


def test_eval_measures_the_loss_of_training(finished: FinishedRun) -> None:
    result = qlora("eval", finished.run, "--json").json
    assert {"task", "loss", "perplexity", "score", "rows", "tokens"} <= result.keys()
    assert result["task"] == "loss" and result["rows"] == 4
    assert math.isclose(result["loss"], finished.manifest["result"]["eval_loss"], rel_tol=1e-6)
    assert math.isclose(result["perplexity"], math.exp(result["loss"]), rel_tol=1e-6)
    earlier = qlora("eval", finished.run / "checkpoint-000002", "--json").json
    assert earlier["loss"] != result["loss"]


def test_eval_of_a_model_is_eval_of_the_base_model(finished: FinishedRun) -> None:
    before = qlora("eval", finished.model, "--data", finished.data, "--json").json
    after = qlora("eval", finished.model, "--adapter", finished.run, "--data", finished.data, "--json").json
    same = qlora("eval", finished.run, "--data", finished.data, "--json").json
    assert before["rows"] == after["rows"] == 16 and after["loss"] < before["loss"]
    assert after["loss"] == same["loss"]


def test_exact_match_is_a_fraction(finished: FinishedRun) -> None:
    result = qlora("eval", finished.run, "--task", "exact-match", "--json").json
    assert result["task"] == "exact-match" and 0 <= result["score"] <= 1


def test_generate_reads_a_text_a_file_and_stdin(
    finished: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (row,) = qlora("generate", finished.run, "one two", "--max-new-tokens", 5, "--json").json["rows"]
    assert {"prompt", "input_ids", "output_ids", "text"} <= row.keys() and row["prompt"] == "one two"
    assert 1 <= len(row["output_ids"]) <= 5
    file = tmp_path / "prompts.jsonl"
    turns = [{"role": "user", "content": "one two"}]
    file.write_text(json.dumps({"prompt": "a longer one than the others"}) + "\n" + json.dumps({"messages": turns}))
    longer, same = qlora("generate", finished.run, file, "--max-new-tokens", 5, "--json").json["rows"]
    assert same["input_ids"] == row["input_ids"] and same["output_ids"] == row["output_ids"]  # in any batch
    assert longer["input_ids"] != row["input_ids"]
    monkeypatch.setattr("sys.stdin", io.StringIO("one two\n"))
    (from_stdin,) = qlora("generate", finished.run, "-", "--max-new-tokens", 5, "--json").json["rows"]
    assert from_stdin["output_ids"] == row["output_ids"]
    plain = qlora("generate", finished.run, "one two", "--max-new-tokens", 5)
    assert plain.code == 0 and plain.out.rstrip("\n") == row["text"]


def test_export_prints_path_and_agreement(finished: FinishedRun, tmp_path: Path) -> None:
    merged = qlora("export", finished.run, tmp_path / "merged", "--to", "merged", "--json").json
    assert {"path", "base", "dtype", "bytes", "agreement"} <= merged.keys()
    assert {"mean_kl", "top1", "max_logit_difference", "rows"} <= merged["agreement"].keys()
    assert merged["path"] == str(tmp_path / "merged") and merged["base"] == "dequantized"
    assert merged["dtype"] == "float32" and merged["agreement"]["top1"] == 1.0 and merged["agreement"]["rows"] == 4
    adapter = qlora("export", finished.run, tmp_path / "adapter", "--to", "adapter", "--json").json
    assert {"mean_kl", "top1"} <= adapter["agreement"].keys()  # of the 16-bit base with the adapter
    assert differing_tensors(finished.run, tmp_path / "adapter") == []
    without = qlora("export", finished.run, tmp_path / "plain", "--to", "merged", "--rows", 0, "--json").json
    assert without["agreement"] is None and without["bytes"] == merged["bytes"]


def test_check_plan_preview_and_doctor_print_json(finished: FinishedRun) -> None:
    check = qlora("check", finished.recipe, "--json").json
    assert {"ok", "problems", "warnings", "data", "memory"} <= check.keys() and check["ok"] is True
    assert {"rows", "kept", "dropped", "tokens", "trained_tokens"} <= check["data"].keys()
    plan = qlora("plan", finished.recipe, "--gpu", "24GiB", "--json").json
    keys = {"model", "parameters", "trainable_parameters", "gpu_bytes", "peak_bytes", "owners", "fits", "choice"}
    assert keys | {"host_bytes", "compare"} <= plan.keys() and plan["gpu_bytes"] == 24 * 2**30
    assert {"recompute", "offload_activations", "weights", "micro_batch"} <= plan["choice"].keys()
    assert {"full_finetune_bytes", "lora_16bit_bytes", "qlora_bytes"} <= plan["compare"].keys()
    assert plan["trainable_parameters"] == finished.manifest["adapter"]["trainable_parameters"]
    assert plan["parameters"] == finished.manifest["adapter"]["parameters"]
    rows = qlora("preview", finished.recipe, "-n", 2, "--json").json["rows"]
    assert len(rows) == 2 and all({"where", "input_ids", "labels", "segments"} <= row.keys() for row in rows)
    assert all(re.fullmatch(rf"{finished.data}:\d+", row["where"]) for row in rows)
    assert all({"text", "trained"} <= segment.keys() for row in rows for segment in row["segments"])
    doctor = qlora("doctor", "--json").json
    keys = {"python", "torch", "bitsandbytes", "accelerate", "transformers", "devices", "problems"}
    assert keys <= doctor.keys()
