"""Two processes over gloo take the same step as one process, for every split and packing of the examples."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.child_processes import Notify
from support.rank_processes import pair
from support.step_gradients import gradients, job_of, random_examples

from qlora.data.batching.packing import pack

Zoo = Callable[..., Path]
TOLERANCE = 1e-6  # float32 sums of the same products in another order
REPEATS = 10  # splits of the same sixteen examples


def save_gradients(model: Path, folder: Path, splits: int, out: Path) -> None:
    """The gradients of `splits` random splits and packings, computed by this rank and the other one."""
    folder.mkdir()
    job = job_of(model, folder, "adapter.dropout=0")
    assert job.processes.world_size == 2
    rng, results = random.Random(0), []
    for trial in range(splits):
        if trial % REPEATS == 0:
            examples = random_examples(trial)
        sequences = rng.sample(examples, len(examples))
        sequences = pack(sequences, rng.randint(40, 200)) if rng.random() < 0.5 else sequences
        results.append(gradients(job, train=sequences, micro_batch=rng.randint(1, 9), global_batch=16))
    if job.processes.is_main:
        save_file({"gradients": torch.stack(results)}, out)
    job.processes.end()


@pytest.mark.sample(of=2)
@pytest.mark.parametrize(
    ("family", "splits"), [("llama", 4), ("experts", 4), pytest.param("llama", 200, marks=pytest.mark.slow)]
)
def test_random_splits_over_two_ranks_give_the_gradient_of_one(
    zoo: Zoo, expert_zoo: Zoo, tmp_path: Path, family: str, splits: int
) -> None:
    model = zoo(family) if family == "llama" else expert_zoo("qwen3_moe")
    out = tmp_path / "two.safetensors"

    def work(rank: int, notify: Notify) -> None:
        save_gradients(model, tmp_path / str(rank), splits, out)

    assert [child.wait() for child in pair(work, tmp_path)] == [0, 0], (tmp_path / "log-0").read_text()
    (tmp_path / "alone").mkdir()
    job = job_of(model, tmp_path / "alone", "adapter.dropout=0")
    alone = [
        gradients(job, train=random_examples(trial), micro_batch=16, global_batch=16)
        for trial in range(0, splits, REPEATS)
    ]
    one, two = torch.stack(alone).repeat_interleave(REPEATS, dim=0)[:splits], load_file(out)["gradients"]
    assert one.shape == two.shape and len(one) == splits
    worst = float(((one - two).norm(dim=1) / one.norm(dim=1)).max())
    assert 0 < worst <= TOLERANCE
