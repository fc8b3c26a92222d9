"""Loss scaling on two ranks: an overflow on one is a skipped step of both, and the curve is that of one process."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.rank_processes import pair
from support.small_runs import metrics, recipe_of, run, write_records
from support.stopped_runs import non_finite_gradient

from qlora.recipe.recipe import Recipe

Zoo = Callable[..., Path]
TOLERANCE = 1e-3  # of a loss, as between float16 and float32
OVERFLOWS = [2, 3]  # steps


def float16_recipe(model: Path, folder: Path, name: str, kind: str, micro_batch: int) -> Recipe:
    data = write_records(folder / "records.jsonl", 12)
    options = ("model.dtype=float16", f"distributed.kind={kind}", f"train.micro_batch={micro_batch}")
    saving = ("train.save_every=6", "optim.learning_rate=1e-3")
    return recipe_of(model, data, folder / name, *options, *saving)


@pytest.fixture(scope="module")
def alone(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    with non_finite_gradient(OVERFLOWS, float("inf")):
        run(float16_recipe(zoo("llama"), folder, "run", "single", 4))
    return folder / "run"


@pytest.mark.sample(of=4)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_an_overflow_on_one_rank_is_skipped_by_all(zoo: Zoo, alone: Path, kind: str, tmp_path: Path) -> None:
    recipe = float16_recipe(zoo("llama"), tmp_path, "run", kind, 2)

    def work(rank: int, notify: object) -> None:
        with non_finite_gradient(OVERFLOWS if rank == 1 else [], float("inf")):
            run(recipe)

    codes = [child.wait() for child in pair(work, tmp_path)]
    assert codes == [0, 0], (tmp_path / "log-0").read_text() + (tmp_path / "log-1").read_text()
    results = [json.loads((folder / "run.json").read_text())["result"] for folder in (alone, tmp_path / "run")]
    assert results[0]["overflow_steps"] == results[1]["overflow_steps"] == len(OVERFLOWS)
    for line, expected in zip(metrics(tmp_path / "run"), metrics(alone), strict=True):
        assert (line["loss_scale"], line["skipped_steps"]) == (expected["loss_scale"], expected["skipped_steps"])
        if expected["loss"] is None:
            assert line["loss"] is None
        else:
            assert abs(line["loss"] - expected["loss"]) <= TOLERANCE
