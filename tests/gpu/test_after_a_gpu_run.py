"""What follows a run on the pretended GPU: second start from the cached base, eval, generate, chat, export, advise."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.gpu_runs import GpuRun, GpuRuns, checked_gpu
from support.pretended_gpu import on_gpu
from support.small_runs import differing_tensors

from qlora.data.types import Message
from qlora.exporters import ExportRequest
from qlora.exporters.export_run import export_run
from qlora.model import quantized_cache
from qlora.runs.advise.after import advise_after
from qlora.runs.conversation import ChatSession
from qlora.runs.evaluate import evaluate_run
from qlora.runs.generate import generate_from_prompts
from qlora.runs.load_run import load_run, load_with_adapters

# Without prompts that the report would answer; the streamed run has them.
SETTINGS = ("data.eval_fraction=0.2", "optim.learning_rate=0.02", "data.train_on=all")
PROMPTS = [("red", [Message("user", "red")]), ("a longer one", [Message("user", "blue one two")])]
BASES = ("llama", pytest.param("llama-tied-bias", marks=pytest.mark.slow))  # the first has a head of its own


@pytest.fixture(autouse=True)
def _cached_bases(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every base is cached, of any size; the folder is common to all tests of this file."""
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path_factory.getbasetemp() / "gpu-cache"))
    monkeypatch.setattr(quantized_cache, "MIN_BASE_BYTES", 0)
    yield


def finished(runs: GpuRuns, family: str, *more: str) -> GpuRun:
    return runs.train(*SETTINGS, *more, family=family)


@pytest.mark.parametrize("family", BASES)
def test_a_second_start_reads_the_cached_base_to_the_gpu(runs: GpuRuns, family: str) -> None:
    first = finished(runs, family)
    second = runs.train_anew(*SETTINGS, family=family)
    assert differing_tensors(first.folder, second.folder) == []
    with checked_gpu():
        base = load_run(str(first.folder)).base
        assert any("earlier start" in note for note in base.notes)
        assert all(on_gpu(value) for value in (*base.model.parameters(), *base.model.buffers()))


def test_a_run_evaluates_generates_and_chats(runs: GpuRuns) -> None:
    folder = str(finished(runs, "llama").folder)
    with checked_gpu():
        loaded = load_run(folder)
        assert evaluate_run(loaded, None, "loss")["loss"] > 0
        for temperature in (0.0, 1.0):
            rows = generate_from_prompts(loaded, PROMPTS, 3, temperature)
            assert len(rows) == len(PROMPTS)
        loaded, switch = load_with_adapters(folder, {"a": folder, "b": folder})
        session = ChatSession(loaded, switch, max_new_tokens=3, temperature=1.0)
        assert isinstance("".join(session.answer("red")), str)
        switch.activate(None)
        assert isinstance("".join(session.answer("blue")), str)


@pytest.mark.parametrize("family", BASES)
def test_an_export_is_certified(runs: GpuRuns, family: str, tmp_path: Path) -> None:
    run_folder = str(finished(runs, family).folder)
    with checked_gpu():
        answer = export_run(load_run(run_folder), ExportRequest("merged", dtype="float32"), str(tmp_path / "merged"))
    assert answer["agreement"]["top1"] == 1.0


def test_a_streamed_run_with_its_embedding_on_the_host_is_exported(runs: GpuRuns, tmp_path: Path) -> None:
    streamed = runs.train(*SETTINGS, "data.train_on=assistant", "memory.weights=stream")
    with checked_gpu():
        loaded = load_run(str(streamed.folder))
        assert not on_gpu(loaded.base.model.get_input_embeddings().weight)  # type: ignore[operator]
        answer = export_run(loaded, ExportRequest("merged", dtype="float32"), str(tmp_path / "merged"))
    assert answer["agreement"]["top1"] == 1.0


@pytest.mark.slow
def test_dora_is_exported_as_the_nearest_lora(runs: GpuRuns, tmp_path: Path) -> None:
    dora = runs.train(*SETTINGS, "adapter.kind=dora")
    with checked_gpu():
        export_run(load_run(str(dora.folder)), ExportRequest("portable", rank=8), str(tmp_path / "portable"))


def test_a_run_is_judged(runs: GpuRuns) -> None:
    folder = finished(runs, "llama").folder
    with checked_gpu():
        assert advise_after(str(folder))
