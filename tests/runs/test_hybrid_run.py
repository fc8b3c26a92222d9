"""Runs of a tiny hybrid and a tiny mixture of experts: packed rows learned and answered, resumed, read by PEFT."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.adapted_models import build_adapter, identity_of, load_base, load_plain, logits, randomize_adapter
from support.architectures import save_architecture
from support.expert_families import save_family
from support.small_runs import WORDS, metrics, recipe_of, run
from support.stopped_runs import ReferenceRun, assert_same_run

from qlora.adapters import peft_files
from qlora.adapters.inject import adapted, inject
from qlora.data.types import Message
from qlora.exporters import ExportRequest
from qlora.exporters.export_run import export_run
from qlora.runs.generate import generate_from_prompts
from qlora.runs.load_run import LoadedRun, load_run

Answer = tuple[str, str]
ROWS: list[Answer] = [(f"{number} {WORDS[number % 10]}", WORDS[(7 * number + 3) % 10]) for number in range(20)]
SETTINGS = ("adapter.rank=16", "data.packing=true", "data.max_length=192", "optim.learning_rate=2e-2",
            "train.max_steps=40", "train.micro_batch=4")  # fmt: skip
# The forms of mixers: delta rule, Mamba 1 and 2 in PEFT's own list and outside of it, convolution, shared layers.
FORMS = ("qwen3_5_text", "mamba", "nemotron_h", "granitemoehybrid", "lfm2", "zamba2")


MODELS: dict[str, Callable[[Path], Path]] = {
    "hybrid": lambda folder: save_architecture(folder, "qwen3_5_text", 10**6),  # Gated DeltaNet and attention
    "experts": lambda folder: save_family(folder, "qwen3_moe"),
}


@pytest.fixture(scope="module", params=MODELS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedRun:
    folder = tmp_path_factory.mktemp(request.param)
    model = MODELS[request.param](folder / "model")
    records = [{"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
               for question, answer in ROWS]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    run(recipe_of(model, folder / "rows.jsonl", folder / "run", *SETTINGS))
    return load_run(str(folder / "run"))


@pytest.mark.sample(of=2)
def test_twenty_packed_rows_are_learned_answered_and_merged(trained: LoadedRun, tmp_path: Path) -> None:
    losses = [line["loss"] for line in metrics(trained.recipe.train.output)]
    assert losses[-1] < 0.05 * losses[0]
    prompts = [(question, [Message("user", question)]) for question, _ in ROWS]
    answers = [row["text"] for row in generate_from_prompts(trained, prompts, 8, 0.0)]
    assert answers == [answer for _, answer in ROWS]
    export_run(trained, ExportRequest(to="merged", dtype="float32"), str(tmp_path / "merged"))
    ids = torch.randint(40, 200, (2, 24), generator=torch.Generator().manual_seed(1))
    expected, merged = logits(trained.base.model.eval(), ids), logits(load_plain(tmp_path / "merged"), ids)
    assert torch.equal(expected.argmax(-1), merged.argmax(-1))
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-3 * float(expected.std()))


@pytest.mark.sample(of=2)
@pytest.mark.parametrize("kind", MODELS)
def test_a_resumed_run_is_the_uninterrupted_one(kind: str, tmp_path: Path) -> None:
    reference = ReferenceRun(MODELS[kind](tmp_path / "model"), tmp_path, "adamw_8bit")  # packed
    output = reference.copy_until(3, tmp_path / "run")
    run(reference.recipe(output))
    assert_same_run(reference.output, output)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return lambda kind: save_architecture(tmp_path_factory.mktemp(kind), kind, 10**6)


@pytest.mark.parametrize("kind", FORMS)
def test_peft_reads_the_adapter_of_a_hybrid(kind: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    folder = bases(kind)
    base, adapter = load_base(folder, "dense"), build_adapter(rank=3, alpha=5.0)
    inject(base.model, adapter, "all-linear", 0)
    randomize_adapter(base.model)
    peft_files.write(tmp_path, base.model, adapter, identity_of(base))
    before, ours = logits(load_plain(folder)), logits(base.model.eval())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's own about transformers
        theirs = logits(peft.PeftModel.from_pretrained(load_plain(folder), tmp_path).eval())
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
    assert adapted(base.model) and (before - ours).abs().max() > 0.1
