"""Two real processes over gloo take the very step that one process takes, however the rows are split and packed."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.paths import TESTS
from support.step_gradients import gradients, job_of, rows_of

Zoo = Callable[..., Path]
# float32: sums of the same products in another order.
TOLERANCE = 1e-6

STEPS = """
import random, sys
from pathlib import Path
sys.path[:0] = [{tests!r}]
import torch
from safetensors.torch import save_file
from qlora.data.batching.packing import pack
from support.step_gradients import gradients, job_of, rows_of

torch.set_num_threads(1)
folder = Path(sys.argv[1])
folder.mkdir()
job = job_of(Path({model!r}), folder, "adapter.dropout=0")
assert job.processes.world == {world}
draw, found = random.Random(0), []
for trial in range({splits}):
    if trial % {alike} == 0:
        examples = rows_of(trial)
    rows = draw.sample(examples, len(examples))
    rows = pack(rows, draw.randint(40, 200)) if draw.random() < 0.5 else rows
    found.append(gradients(job, train=rows, micro_batch=draw.randint(1, 9), global_batch=16))
if job.processes.is_main:
    save_file({{"gradients": torch.stack(found)}}, {out!r})
job.processes.end()
"""
WORLD, ALIKE = 2, 20  # processes; splits of the same sixteen rows


def in_processes(code: str, folder: Path) -> None:
    """Run `code` in WORLD processes, each with a folder of its own; each must end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(WORLD):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env = {**os.environ, **{name: str(value) for name, value in place.items()}}
        env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-c", code, str(folder / str(rank))]
        running.append(subprocess.Popen(command, env=env, cwd=TESTS.parent, stderr=subprocess.PIPE, text=True))
    for process in running:
        _, said = process.communicate(timeout=600)
        assert process.returncode == 0, said


@pytest.mark.parametrize("splits", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_random_splits_over_two_processes_give_the_gradient_of_one(zoo: Zoo, tmp_path: Path, splits: int) -> None:
    model, out = zoo("llama"), tmp_path / "two.safetensors"
    names = {"tests": str(TESTS), "model": str(model), "out": str(out)}
    in_processes(STEPS.format(**names, world=WORLD, splits=splits, alike=ALIKE), tmp_path)
    (tmp_path / "alone").mkdir()
    job = job_of(model, tmp_path / "alone", "adapter.dropout=0")
    alone = [gradients(job, train=rows_of(trial), micro_batch=16, global_batch=16) for trial in range(0, splits, ALIKE)]
    one, two = torch.stack(alone).repeat_interleave(ALIKE, dim=0), load_file(out)["gradients"]
    assert one.shape == two.shape and len(one) == splits
    worst = float(((one - two).norm(dim=1) / one.norm(dim=1)).max())
    assert 0 < worst <= TOLERANCE
