"""A run that fails after its last step keeps what it trained in suspect-adapter/, with the reason."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.small_runs import recipe_of, run, write_records
from support.training_hooks import before_first_forward

from qlora.adapters import peft_files
from qlora.errors import QloraError
from qlora.quant.linear import FrozenLinear
from qlora.runs.artifacts import MANIFEST, SUSPECT
from qlora.runs.load_run import load_run
from qlora.runs.suspect_adapter import REASON
from qlora.training.loss import TokenLoss
from qlora.utils.atomic_files import read_json


def flip_bit(model: TokenLoss) -> None:
    layer = next(module for module in model.modules() if isinstance(module, FrozenLinear))
    next(layer.parameters(recurse=False)).view(-1).view(torch.uint8)[5] ^= 1


def test_the_adapter_of_a_failed_run_is_kept_and_marked(zoo: Callable[..., Path], tmp_path: Path) -> None:
    output, data = tmp_path / "run", write_records(tmp_path / "rows.jsonl", 8)
    recipe = recipe_of(zoo("llama"), data, output, "train.max_steps=3", "train.resume=never")
    with before_first_forward(flip_bit), pytest.raises(QloraError, match="bytes of the frozen base model changed"):
        run(recipe)
    folder = output / SUSPECT
    assert not (output / MANIFEST).exists() and not (output / peft_files.WEIGHTS).exists()
    reason = read_json(folder / REASON)
    assert reason["step"] == 3 and "bytes of the frozen base model changed" in reason["error"]
    pairs = peft_files.read(folder).pairs
    assert len(pairs) == 14 and all(bool(b.any()) for _, b in pairs.values())
    assert load_run(str(folder)).adapter is not None  # an adapter folder like any other
    run(recipe)
    assert (output / MANIFEST).exists() and not folder.exists()
