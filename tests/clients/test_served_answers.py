"""Exports in the programs that load them: greedy answers token for token, prompt ids of 1, 2 and 4 turns."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support.client_jobs import ask, equal, python_of, record
from support.client_models import NAMES, TOKENS, build, conversations
from support.paths import ROOT

pytestmark = [pytest.mark.clients, pytest.mark.xdist_group("clients")]
MODELS = ROOT / "build" / "clients" / "models"


def model_of(name: str) -> tuple[Path, dict[str, Any]]:
    folder = build(MODELS / name, name)
    return folder, json.loads((folder / "reference.json").read_text())


def compare(client: str, name: str, export: str, tmp_path: Path, **options: Any) -> None:
    """The client's answers to the run's prompts are the run's; its prompt ids are those of training."""
    python_of(client)
    folder, reference = model_of(name)
    job = {"prompts": reference["prompts"], "conversations": conversations(), "tokens": TOKENS, **options}
    if "adapter" in options:
        job |= {"model": str(folder / "base"), "adapter": str(folder / export), "rank": 8}
        expected = peft_answers(name)
    else:
        job["model"], expected = str(folder / export), reference["answers"]
    result = ask(client, job, tmp_path)
    answers = equal(result["answers"], expected)
    prompts = equal(result["prompts"], reference["prompts"]) if result["prompts"] else None
    figures = {"answers": answers, "of": len(expected)} | ({} if prompts is None else {"prompts": prompts})
    record(client, result["version"], name, export, figures)
    assert answers == len(expected) and prompts in (None, len(expected))


@cache
def peft_answers(name: str) -> list[list[int]]:
    """Greedy answers of PEFT on the 16-bit base, as servers compute; an answer ends as the run's do."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, reference = model_of(name)
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    answers = []
    for ids in reference["prompts"]:
        inputs = torch.tensor([ids])
        options = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": STOPS, "pad_token_id": 3}
        output = model.generate(inputs, attention_mask=torch.ones_like(inputs), **options)
        answers.append(output[0, len(ids) :].tolist())
    return answers


STOPS = [2]  # <|im_end|> of the demo's tokenizer


@pytest.mark.parametrize("name", NAMES)
def test_vllm_answers_as_the_run(name: str, tmp_path: Path) -> None:
    compare("vllm", name, "merged", tmp_path)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "qwen3"])  # DoRA: portable is an approximation
def test_vllm_answers_as_peft_with_a_portable_adapter(name: str, tmp_path: Path) -> None:
    compare("vllm", name, "portable", tmp_path, adapter=True, stop_token_ids=STOPS)


@pytest.mark.parametrize("name", NAMES)
def test_mlx_answers_as_the_run(name: str, tmp_path: Path) -> None:
    compare("mlx", name, "merged", tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_mlx_answers_as_peft_with_its_adapter(name: str, tmp_path: Path) -> None:
    compare("mlx", name, "mlx", tmp_path, adapter=True, stop_token_ids=STOPS)


@pytest.mark.parametrize("name", NAMES)
def test_an_older_transformers_answers_as_the_run(name: str, tmp_path: Path) -> None:
    compare("transformers", name, "merged", tmp_path)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("export", ["adapter", "portable"])
def test_an_older_peft_answers_as_the_current_one(name: str, export: str, tmp_path: Path) -> None:
    if name == "qwen3" and export == "portable":
        pytest.skip("the LoRA nearest to DoRA is an approximation")
    compare("transformers", name, export, tmp_path, adapter=True, stop_token_ids=STOPS)
