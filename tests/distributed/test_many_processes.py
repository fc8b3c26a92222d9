"""DDP and FSDP on several ranks: every step equals that of one process, and no byte of the base changes."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.child_processes import Child
from support.rank_processes import ranks
from support.small_runs import adapter_tensors, metrics, recipe_of, run, write_records
from support.stopped_runs import signal_in_step

from qlora.adapters import peft_files
from qlora.errors import InputError, Stopped
from qlora.model.linear_layers import frozen_linears
from qlora.recipe.planning import Machine, Planner
from qlora.recipe.recipe import Recipe
from qlora.runs.resources import open_processes, resolve_resources, unplanned
from qlora.runs.setup import build_job, set_up
from qlora.training.checkpoint import Position
from qlora.training.loop import fit
from qlora.training.run_log import Log, read_metrics
from qlora.training.signals import StopSignal

Zoo = Callable[..., Path]
STEPS = 4
RECORDS = 17  # global batch 6: three steps an epoch, the last of five examples; not divisible by two or three
LOSS, ADAPTER = 1e-5, 1e-4  # relative, absolute: float32 sums of the same products in another order, over STEPS steps
PROMPTS = "train.sample_prompts=[red one]"  # all ranks of a sharded model answer, and its head is sharded again
CASES = {
    "accumulation": ("train.micro_batch=1", PROMPTS),
    "packing": ("data.packing=true", "train.micro_batch=2", "memory.recompute=all", PROMPTS),
    "offload": ("memory.offload_activations=true", "train.micro_batch=2"),
    "dora": ("adapter.kind=dora", "train.micro_batch=2", "memory.recompute=none"),
}


def recipe_for(model: Path, folder: Path, case: str, name: str, *overrides: str) -> Recipe:
    data = write_records(folder / "records.jsonl", RECORDS, max_words=12)
    options = (f"train.max_steps={STEPS}", "train.global_batch=6", "optim.schedule=linear", "optim.learning_rate=1e-3")
    return recipe_of(model, data, folder / name, *options, "data.eval_fraction=0.2", *CASES[case], *overrides)


def fit_recipe(recipe: Recipe) -> None:
    """The training loop alone; rank 0 writes metrics, adapters and a digest of the packed base."""
    resources, output = unplanned(recipe), Path(recipe.train.output)
    processes = resources.processes
    log = Log(output, quiet=True)
    if processes.is_main:
        log.truncate(0)
    setup = set_up(recipe, resources, log)
    sharded = sharded_parameters(setup.base.model)  # reading DoRA's norms leaves a layer gathered until its forward
    fit(build_job(setup, log, StopSignal()), Position())
    assert sharded <= sharded_parameters(setup.base.model)
    digest = hashlib.sha256()
    for layer in frozen_linears(setup.base.model).values():  # sharded layers are gathered one by one
        for tensor in layer.stored().values():
            assert not hasattr(tensor, "to_local")
            digest.update(tensor.detach().clone().view(torch.uint8).numpy())  # a copy: FSDP frees the gathered tensor
    if processes.is_main:
        save_file(peft_files.tensors(setup.base.model), output / "adapters.safetensors")
        (output / "packed.json").write_text(json.dumps([digest.hexdigest(), setup.base.manifest.sha256]))
    processes.end()


def sharded_parameters(model: torch.nn.Module) -> set[str]:
    return {name for name, value in model.named_parameters() if hasattr(value, "to_local")}


@pytest.fixture(scope="module")
def alone(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run folder of a case, trained by one process."""
    folders: dict[str, Path] = {}

    def run_of(case: str) -> Path:
        if case not in folders:
            folders[case] = tmp_path_factory.mktemp(case)
            fit_recipe(recipe_for(zoo("llama"), folders[case], case, "alone"))
        return folders[case] / "alone"

    return run_of


def on_ranks(work: Callable[[Recipe], object], recipe: Recipe, folder: Path, world_size: int) -> Path:
    """The run folder of a recipe after `work` on all ranks, each of which must exit with code 0."""

    def work_on_rank(rank: int, notify: object) -> None:
        work(recipe)

    codes = [child.wait() for child in ranks(work_on_rank, folder, world_size)]
    assert codes == [0] * world_size, (folder / "log-0").read_text()
    return Path(recipe.train.output)


FAST = {("ddp", 2, "packing"), ("fsdp", 2, "accumulation"), ("fsdp", 3, "packing"), ("fsdp", 2, "dora")}
ALL = [(kind, world_size, case) for kind in ("ddp", "fsdp") for world_size in (2, 3) for case in CASES]


@pytest.mark.sample(of=4)
@pytest.mark.parametrize(
    ("kind", "world_size", "case"),
    [pytest.param(*values, marks=[] if values in FAST else pytest.mark.slow) for values in ALL],
)
def test_several_ranks_train_as_one_process(
    zoo: Zoo, alone: Callable[[str], Path], tmp_path: Path, kind: str, world_size: int, case: str
) -> None:
    one, prompted = alone(case), PROMPTS in CASES[case]
    recipe = recipe_for(zoo("llama"), tmp_path, case, "several", f"distributed.kind={kind}")
    several = on_ranks(fit_recipe, recipe, tmp_path, world_size)
    assert (several / "packed.json").read_text() == (one / "packed.json").read_text()
    for line, expected in zip(read_metrics(several), read_metrics(one), strict=True):
        assert line["event"] == expected["event"] and line.get("learning_rate") == expected.get("learning_rate")
        key = "loss" if line["event"] == "train" else "eval_loss"
        assert line[key] == pytest.approx(expected[key], rel=LOSS), line["step"]
        assert line.get("answers") == expected.get("answers") and ("answers" in line) == (key != "loss" and prompted)
    assert_close(*(load_file(folder / "adapters.safetensors") for folder in (several, one)))


def assert_close(adapters: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert adapters.keys() == expected.keys()
    assert max(float((adapters[name] - expected[name]).abs().max()) for name in expected) <= ADAPTER


LAUNCHES = [
    ((1, "single"), (3, "fsdp")), ((3, "fsdp"), (2, "ddp")), ((2, "ddp"), (2, "fsdp")), ((2, "fsdp"), (1, "single")),
]  # fmt: skip


@pytest.mark.sample(of=4)
@pytest.mark.parametrize("launches", LAUNCHES, ids=lambda launches: "-".join(kind for _, kind in launches))
def test_a_run_resumes_with_any_number_of_ranks_and_any_strategy(
    zoo: Zoo, tmp_path: Path, launches: tuple[tuple[int, str], ...]
) -> None:
    data = write_records(tmp_path / "records.jsonl", RECORDS, max_words=9)

    def recipe(name: str, steps: int, kind: str) -> Recipe:
        options = (f"train.max_steps={steps}", "train.global_batch=6", "optim.warmup=0", "data.eval_fraction=0.2")
        saving = ("train.save_every=2", "train.eval_every=2", "train.keep=9", f"distributed.kind={kind}")
        # train_on all: there are no prompts to answer, which would cost more than the steps.
        return recipe_of(zoo("llama"), data, tmp_path / name, *options, *saving, "data.train_on=all")

    run(recipe("uninterrupted", 4, "single"))
    for world_size, kind in launches:
        steps = 2 * (1 + len(list((tmp_path / "resumed").glob("checkpoint-*"))))
        on_ranks(run, recipe("resumed", steps, kind), tmp_path, world_size)
    for line, expected in zip(metrics(tmp_path / "resumed"), metrics(tmp_path / "uninterrupted"), strict=True):
        assert line["step"] == expected["step"] and line["learning_rate"] == expected["learning_rate"]
        assert line["loss"] == pytest.approx(expected["loss"], rel=LOSS)
    assert_close(adapter_tensors(tmp_path / "resumed"), adapter_tensors(tmp_path / "uninterrupted"))


def test_a_cosine_rate_survives_a_stop_on_one_process_and_a_resume_on_two(zoo: Zoo, tmp_path: Path) -> None:
    data = write_records(tmp_path / "records.jsonl", RECORDS, max_words=9)
    options = ("train.max_steps=4", "optim.schedule=cosine", "optim.warmup=0.2", "data.train_on=all")
    recipes = {name: recipe_of(zoo("llama"), data, tmp_path / name, *options) for name in ("whole", "stopped")}
    run(recipes["whole"])
    with signal_in_step(2), pytest.raises(Stopped):
        run(recipes["stopped"])
    on_ranks(run, recipes["stopped"], tmp_path, 2)
    for line, expected in zip(metrics(tmp_path / "stopped"), metrics(tmp_path / "whole"), strict=True):
        assert line["step"] == expected["step"] and line["learning_rate"] == expected["learning_rate"]
        assert line["loss"] == pytest.approx(expected["loss"], rel=LOSS)
    assert_close(adapter_tensors(tmp_path / "stopped"), adapter_tensors(tmp_path / "whole"))


@pytest.mark.parametrize("again", [(), pytest.param((("repeated", "fsdp"),), marks=pytest.mark.slow)], ids=len)
def test_as_many_ranks_write_the_same_file_with_ddp_and_fsdp(
    zoo: Zoo, tmp_path: Path, again: tuple[tuple[str, str], ...]
) -> None:
    data = write_records(tmp_path / "records.jsonl", RECORDS, max_words=9)
    files = []
    for name, kind in (("sharded", "fsdp"), ("replicated", "ddp"), *again):
        options = ("train.max_steps=2", "train.global_batch=5", "adapter.dropout=0.1", f"distributed.kind={kind}")
        on_ranks(run, recipe_of(zoo("qwen3"), data, tmp_path / name, *options), tmp_path, 2)
        files.append((tmp_path / name / peft_files.WEIGHTS).read_bytes())
    assert len({*files}) == 1


@pytest.mark.slow
def test_a_sharded_base_generates_as_an_unsharded_one(zoo: Zoo, tmp_path: Path) -> None:
    data, samples = write_records(tmp_path / "records.jsonl", RECORDS, max_words=9), []
    for kind in ("fsdp", "ddp"):
        options = ("train.max_steps=4", "data.eval_fraction=0.1", f"distributed.kind={kind}")
        on_ranks(run, recipe_of(zoo("llama-tied-bias"), data, tmp_path / kind, *options), tmp_path, 2)
        samples.append(json.loads((tmp_path / kind / "run.json").read_text())["samples"])
    assert samples[0] == samples[1] != []


def test_fsdp_with_one_rank_equals_the_single_process(zoo: Zoo, tmp_path: Path) -> None:
    """Bit for bit, without a launcher: one GPU can test what needs several."""
    data = write_records(tmp_path / "records.jsonl", RECORDS, max_words=9)
    recipes = [
        recipe_of(zoo("llama-tied-bias"), data, tmp_path / kind, "train.max_steps=2", f"distributed.kind={kind}")
        for kind in ("single", "fsdp")
    ]

    def work(notify: object) -> None:
        for recipe in recipes:
            run(recipe)

    assert Child(work, tmp_path / "log").wait() == 0, (tmp_path / "log").read_text()
    files = [(tmp_path / kind / peft_files.WEIGHTS).read_bytes() for kind in ("single", "fsdp")]
    assert files[0] == files[1]


REFUSED = {
    "single": ("WORLD_SIZE", "2", "distributed.kind=single"),
    "ddp": ("ACCELERATE_USE_FSDP", "true", "distributed.kind=ddp"),
    "compile": ("WORLD_SIZE", "1", "distributed.kind=fsdp", "train.compile=true"),
    "save_modules": ("WORLD_SIZE", "1", "distributed.kind=fsdp", "adapter.save_modules=[lm_head]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_recipe_and_a_launcher_that_contradict_each_other_are_refused(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    name, value, *options = REFUSED[case]
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"^distributed.kind: .* Use "):
        open_processes(recipe_of(zoo("llama"), tmp_path / "records.jsonl", tmp_path / "run", *options))


def test_a_rank_with_less_memory_has_a_smaller_micro_batch(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four examples fit the memory of rank 0, two that of rank 1: six are split into four and two; losses are equal."""
    options = ("train.micro_batch=4", "train.max_steps=3", "memory.recompute=none", "distributed.kind=ddp")
    recipes = {
        name: recipe_for(zoo("llama"), tmp_path, "accumulation", name, *options[: 3 + (name == "two")])
        for name in ("alone", "two")
    }
    run(recipes["alone"])
    planner = Planner(recipes["two"])
    needed = [planner.plan(Machine.local(2), "ddp", size).peak_bytes for size in (2, 4)]
    assert needed[0] + 2**16 < needed[1]
    # Two ranks of one machine share its memory: each plans with half of it.
    pages, sysconf = sum(needed) // os.sysconf("SC_PAGE_SIZE"), os.sysconf

    def work(rank: int, notify: object) -> None:
        if rank == 1:  # the rank with less memory
            monkeypatch.setattr("os.sysconf", lambda name: pages if name == "SC_PHYS_PAGES" else sysconf(name))
        assert resolve_resources(recipes["two"]).micro_batches == (4, 2)
        run(recipes["two"])

    children = ranks(work, tmp_path, 2)
    assert [child.wait() for child in children] == [0, 0], [(tmp_path / f"log-{i}").read_text() for i in (0, 1)]
    for line, expected in zip(metrics(tmp_path / "two"), metrics(tmp_path / "alone"), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=LOSS)
        assert line["trained_tokens"] == expected["trained_tokens"]
