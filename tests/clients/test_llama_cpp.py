"""GGUF files in llama.cpp: greedy answers and prompt ids of the run, token for token; an adapter on its base."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.client_jobs import ask, equal, python_of, record
from support.client_models import LLAMA_CPP, NAMES, TOKENS, build, conversations
from support.paths import ROOT

from qlora.exporters import ExportRequest
from qlora.exporters.export_run import export_run
from qlora.exporters.gguf.gguf_file import GgufFile
from qlora.model.meta_model import read_tokenizer
from qlora.runs.load_run import load_run

pytestmark = [pytest.mark.clients, pytest.mark.xdist_group("clients")]
MODELS = ROOT / "build" / "clients" / "models"


# In float16 a random model changes an answer where two tokens are all but equally likely; the demo base is trained.
CASES = [*((name, "float32") for name in (*NAMES, *LLAMA_CPP)), ("demo", "float16")]


def file_of(name: str, storage: str) -> tuple[Path, dict[str, Any]]:
    """The file of a model, exported once, and the run's prompts and answers."""
    folder = build(MODELS / name, name, **({"targets": ()} if name in LLAMA_CPP else {}))
    out = folder / f"gguf-{storage}"
    if not out.exists():
        export_run(load_run(str(folder / "run")), ExportRequest("gguf", dtype=storage, rows=16), str(out))
    return out / "model.gguf", json.loads((folder / "reference.json").read_text())


def texts_of(file: Path, base: Path) -> list[str]:
    """The conversations as llama.cpp's server renders them; a BOS of the template is left to the tokenizer."""
    content, tokenizer = GgufFile(file), read_tokenizer(base)
    template, adds_bos = content.get("tokenizer.chat_template"), content.get("tokenizer.ggml.add_bos_token")
    options = {"chat_template": template, "add_generation_prompt": True, "tokenize": False}
    texts = [tokenizer.apply_chat_template(turns, **options) for turns in conversations()]
    bos = tokenizer.bos_token or ""
    return [text.removeprefix(bos) if adds_bos else text for text in texts]


@pytest.mark.parametrize(("name", "storage"), CASES)
def test_llama_cpp_answers_as_the_run(name: str, storage: str, tmp_path: Path) -> None:
    python_of("cyllama")
    file, reference = file_of(name, storage)
    texts = texts_of(file, MODELS / name / "base")
    job = {"model": str(file), "prompts": reference["prompts"], "texts": texts, "tokens": TOKENS}
    result = ask("cyllama", job, tmp_path)
    answers, prompts = (equal(result[key], reference[key]) for key in ("answers", "prompts"))
    record(
        "cyllama",
        result["version"],
        name,
        f"gguf {storage}",
        {"answers": answers, "of": len(texts), "prompts": prompts},
    )
    assert answers == prompts == len(texts)
