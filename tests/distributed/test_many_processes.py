"""Many processes, one answer: DDP and FSDP learn step by step what one process learns; no byte of the base moves."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.child_processes import Child
from support.rank_processes import ranks
from support.small_runs import adapter_tensors, metrics, recipe_of, run, write_rows

from qlora.adapters import peft_files
from qlora.adapters.inject import frozen_linears
from qlora.errors import InputError
from qlora.recipe.planning import plan_under
from qlora.recipe.recipe import Recipe
from qlora.runs.micro_batches import of_size, portions_of
from qlora.runs.strategy import open_processes
from qlora.runs.train import assemble, gather
from qlora.training.checkpoint import Position
from qlora.training.loop import fit
from qlora.training.run_log import Log, read_metrics
from qlora.training.signals import StopSignal

Zoo = Callable[..., Path]
STEPS = 30
ROWS = 17  # global batch 6: three steps an epoch, the last of five rows; nothing divides by two or three
LOSS, ADAPTER = 1e-5, 1e-4  # relative, absolute: float32 sums of the same products in another order, over STEPS steps
CASES = {
    "accumulation": ("train.micro_batch=1",),
    "packing": ("data.packing=true", "train.micro_batch=2", "memory.recompute=all"),
    "parking": ("memory.offload_activations=true", "train.micro_batch=2"),
    "dora": ("adapter.kind=dora", "train.micro_batch=2", "memory.recompute=none"),
}


def recipe_for(model: Path, home: Path, case: str, name: str, *more: str) -> Recipe:
    data = write_rows(home / "rows.jsonl", ROWS, longest=12)
    options = (f"train.max_steps={STEPS}", "train.global_batch=6", "optim.schedule=linear", "optim.learning_rate=1e-3")
    return recipe_of(model, data, home / name, *options, "data.eval_fraction=0.2", *CASES[case], *more)


def learn(recipe: Recipe) -> None:
    """A run's loop; the first process writes losses, rates, adapters and the digest of every packed byte."""
    processes, output = open_processes(recipe), Path(recipe.train.output)
    log = Log(output, quiet=True)
    if processes.is_main:
        log.restart(0)
    parts = gather(recipe, processes, None, log)
    fit(assemble(parts, log, StopSignal()), Position())
    digest = hashlib.sha256()
    for layer in frozen_linears(parts.base.model).values():  # sharded ones are gathered, one layer after the other
        for tensor in layer.stored().values():
            assert not hasattr(tensor, "to_local")
            digest.update(tensor.detach().clone().view(torch.uint8).numpy())  # FSDP frees what numpy would hold
    if processes.is_main:
        save_file(peft_files.tensors(parts.base.model), output / "adapters.safetensors")
        (output / "packed.json").write_text(json.dumps([digest.hexdigest(), parts.base.manifest.sha256]))
    processes.end()


@pytest.fixture(scope="module")
def alone(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The home of a case that one process has learnt."""
    done: dict[str, Path] = {}

    def home_of(case: str) -> Path:
        if case not in done:
            done[case] = tmp_path_factory.mktemp(case)
            learn(recipe_for(zoo("llama"), done[case], case, "alone"))
        return done[case]

    return home_of


def learn_together(recipe: Recipe, home: Path, world: int) -> Path:
    def work(rank: int, tell: object) -> None:
        learn(recipe)

    codes = [child.end() for child in ranks(work, home, world)]
    assert codes == [0] * world, (home / "said-0").read_text()
    return Path(recipe.train.output)


SHOWN = {("ddp", 2, "packing"), ("fsdp", 2, "accumulation"), ("fsdp", 3, "packing"), ("fsdp", 2, "dora")}
EVERY = [(kind, world, case) for kind in ("ddp", "fsdp") for world in (2, 3) for case in CASES]


@pytest.mark.parametrize(
    ("kind", "world", "case"), [pytest.param(*each, marks=[] if each in SHOWN else pytest.mark.slow) for each in EVERY]
)
def test_many_processes_learn_what_one_learns(
    zoo: Zoo, alone: Callable[[str], Path], tmp_path: Path, kind: str, world: int, case: str
) -> None:
    one = alone(case) / "alone"
    many = learn_together(recipe_for(zoo("llama"), tmp_path, case, "many", f"distributed.kind={kind}"), tmp_path, world)
    assert (many / "packed.json").read_text() == (one / "packed.json").read_text()
    for ours, theirs in zip(read_metrics(many), read_metrics(one), strict=True):
        assert ours["event"] == theirs["event"] and ours.get("learning_rate") == theirs.get("learning_rate")
        key = "loss" if ours["event"] == "train" else "eval_loss"
        assert ours[key] == pytest.approx(theirs[key], rel=LOSS), ours["step"]
    adapters, wanted = (load_file(folder / "adapters.safetensors") for folder in (many, one))
    assert adapters.keys() == wanted.keys()
    worst = max(float((adapters[name] - wanted[name]).abs().max()) for name in wanted)
    assert worst <= ADAPTER


def train_together(recipe: Recipe, home: Path, world: int) -> None:
    def work(rank: int, tell: object) -> None:
        run(recipe)

    codes = [child.end() for child in ranks(work, home, world)]
    assert codes == [0] * world, (home / "said-0").read_text()


def test_a_run_goes_on_with_any_number_of_processes_and_any_strategy(zoo: Zoo, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", ROWS, longest=9)

    def recipe(name: str, steps: int, kind: str) -> Recipe:
        options = (f"train.max_steps={steps}", "train.global_batch=6", "optim.warmup=0", "data.eval_fraction=0.2")
        more = ("train.save_every=3", "train.eval_every=3", "train.keep=9", f"distributed.kind={kind}")
        # train_on all: no questions, so no answers, which cost more than the steps.
        return recipe_of(zoo("llama"), data, tmp_path / name, *options, *more, "data.train_on=all")

    run(recipe("whole", 12, "single"))
    for world, kind in ((1, "single"), (2, "fsdp"), (3, "fsdp"), (2, "ddp")):
        steps = 3 * (1 + len(list((tmp_path / "parts").glob("checkpoint-*"))))
        train_together(recipe("parts", steps, kind), tmp_path, world)
    for ours, theirs in zip(metrics(tmp_path / "parts"), metrics(tmp_path / "whole"), strict=True):
        assert ours["step"] == theirs["step"] and ours["learning_rate"] == theirs["learning_rate"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=LOSS)
    whole, parts = adapter_tensors(tmp_path / "whole"), adapter_tensors(tmp_path / "parts")
    assert max(float((whole[name] - parts[name]).abs().max()) for name in whole) <= ADAPTER


def test_one_gathering_is_one_file(zoo: Zoo, tmp_path: Path) -> None:
    """The same number of processes gives the same bytes, whether the base is whole on each or shared out."""
    data = write_rows(tmp_path / "rows.jsonl", ROWS, longest=9)
    files = []
    for name, kind in (("first", "fsdp"), ("again", "fsdp"), ("whole", "ddp")):
        options = ("train.max_steps=4", "train.global_batch=5", "adapter.dropout=0.1", f"distributed.kind={kind}")
        train_together(recipe_of(zoo("qwen3"), data, tmp_path / name, *options), tmp_path, 2)
        files.append((tmp_path / name / peft_files.WEIGHTS).read_bytes())
    assert files[0] == files[1] == files[2]


@pytest.mark.slow
def test_a_sharded_base_answers_as_a_whole_one(zoo: Zoo, tmp_path: Path) -> None:
    data, answers = write_rows(tmp_path / "rows.jsonl", ROWS, longest=9), []
    for kind in ("fsdp", "ddp"):
        options = ("train.max_steps=4", "data.eval_fraction=0.1", f"distributed.kind={kind}")
        train_together(recipe_of(zoo("llama-tied-bias"), data, tmp_path / kind, *options), tmp_path, 2)
        answers.append(json.loads((tmp_path / kind / "run.json").read_text())["samples"])
    assert answers[0] == answers[1] != []


def test_one_process_may_hold_the_only_share(zoo: Zoo, tmp_path: Path) -> None:
    """FSDP without a launcher is the single process, bit for bit: a card can prove a shape that needs several."""
    data = write_rows(tmp_path / "rows.jsonl", ROWS, longest=9)
    recipes = [
        recipe_of(zoo("llama-tied-bias"), data, tmp_path / kind, "data.train_on=all", f"distributed.kind={kind}")
        for kind in ("single", "fsdp")
    ]

    def work(tell: object) -> None:
        for recipe in recipes:
            run(recipe)

    assert Child(work, tmp_path / "said").end() == 0, (tmp_path / "said").read_text()
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
        open_processes(recipe_of(zoo("llama"), tmp_path / "rows.jsonl", tmp_path / "run", *options))


def test_a_card_that_holds_fewer_rows_takes_fewer_and_the_losses_stay(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four rows at a time fit the first process's memory, two the other's: six rows are dealt four and two."""
    options = ("train.micro_batch=4", "train.max_steps=5", "memory.recompute=none", "distributed.kind=ddp")
    recipes = {
        name: recipe_for(zoo("llama"), tmp_path, "accumulation", name, *options[: 3 + (name == "two")])
        for name in ("alone", "two")
    }
    run(recipes["alone"])
    needed = [plan_under(of_size(recipes["two"], size), 2, "ddp").peak_bytes for size in (2, 4)]
    assert needed[0] + 2**16 < needed[1]
    # Processes of one machine share its memory: each plans with its part.
    pages, real = sum(needed) // os.sysconf("SC_PAGE_SIZE"), os.sysconf

    def work(rank: int, tell: object) -> None:
        if rank == 1:  # the smaller machine of the two
            monkeypatch.setattr("os.sysconf", lambda name: pages if name == "SC_PHYS_PAGES" else real(name))
        portions = portions_of(recipes["two"], open_processes(recipes["two"]))
        assert portions.sizes == (4, 2) and portions.own == (4, 2)[rank]
        run(recipes["two"])

    children = ranks(work, tmp_path, 2)
    assert [child.end() for child in children] == [0, 0], [(tmp_path / f"said-{i}").read_text() for i in (0, 1)]
    for mine, theirs in zip(metrics(tmp_path / "two"), metrics(tmp_path / "alone"), strict=True):
        assert (
            mine["loss"] == pytest.approx(theirs["loss"], rel=LOSS)
            and mine["trained_tokens"] == theirs["trained_tokens"]
        )
