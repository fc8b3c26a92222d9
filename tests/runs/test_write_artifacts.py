"""The order in which a run writes: the adapter first, then samples, then the manifest; samples never cost the run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from support.small_runs import recipe_of, run, write_records
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import LlamaModel

from qlora.adapters.peft_files import WEIGHTS
from qlora.runs.write_artifacts import samples_or_note


def test_the_adapter_is_on_disk_before_samples_are_generated(zoo: Callable[..., Path], tmp_path: Path) -> None:
    adapter_is_there: list[bool] = []

    def look(module: nn.Module, _: Any) -> None:
        if isinstance(module, LlamaModel):
            adapter_is_there.append((tmp_path / "run" / WEIGHTS).is_file())

    handle = register_module_forward_pre_hook(look)
    try:
        data = write_records(tmp_path / "records.jsonl", 6)
        manifest = run(recipe_of(zoo("llama"), data, tmp_path / "run", "train.max_steps=1", "data.eval_fraction=0.3"))
    finally:
        handle.remove()
    assert manifest["samples"] and not adapter_is_there[0] and adapter_is_there[-1]
    assert adapter_is_there == sorted(adapter_is_there)


def test_samples_that_run_out_of_memory_are_left_out_with_a_line() -> None:
    class NoMemory:
        """A run setup whose held-out data can't be touched any more."""

        @property
        def data(self) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    class Lines(list[str]):
        print = list.append

    lines = Lines()
    assert samples_or_note(NoMemory(), lines) == []  # type: ignore[arg-type]
    assert "ran out of memory" in lines[0]
