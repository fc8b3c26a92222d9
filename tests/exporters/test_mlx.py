"""mlx-lm's adapter files: the updates of training as mlx-lm computes them, under the names of its classes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.adapted_models import identity_of, inject_trained, load_base
from support.wrapper_families import save_wrapper
from torch import Tensor

from qlora.adapters import peft_files
from qlora.adapters.peft_config import module_settings
from qlora.exporters import ExportRequest
from qlora.exporters.export_run import export_run
from qlora.runs.load_run import load_run
from qlora.utils.atomic_files import read_json


def export(base: Path, folder: Path, kind: str) -> tuple[peft_files.AdapterFile, dict[str, Tensor], dict[str, Any]]:
    """The adapter, and the tensors and settings of its export."""
    loaded = load_base(base, "dense")
    (folder / "source").mkdir()
    peft_files.write(folder / "source", loaded.model, inject_trained(loaded, kind), identity_of(loaded))
    export_run(load_run(str(folder / "source")), ExportRequest("mlx", rows=0), str(folder / "mlx"))
    tensors = load_file(folder / "mlx" / "adapters.safetensors")
    return peft_files.read(folder / "source"), tensors, read_json(folder / "mlx" / "adapter_config.json")


@pytest.mark.parametrize("kind", ["rslora", "dora"])
def test_updates_and_magnitudes_are_those_of_training(zoo: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    file, tensors, config = export(zoo("llama"), tmp_path, kind)
    parameters = config["lora_parameters"]
    assert config["fine_tune_type"] == ("dora" if kind == "dora" else "lora") and config["num_layers"] == 2
    for path, (a, b) in file.pairs.items():
        lora_a, lora_b = (tensors[f"{path}.lora_{side}"] for side in "ab")
        assert lora_a.shape[1] == lora_b.shape[0] == parameters["rank"]
        expected = module_settings(file.config, path, len(a)).scaling * (b @ a).t()
        torch.testing.assert_close(parameters["scale"] * lora_a @ lora_b, expected, rtol=1e-5, atol=1e-6)
        assert path.partition(".layers.")[2].partition(".")[2] in parameters["keys"]
    magnitudes = {name.removesuffix(".m"): tensor for name, tensor in tensors.items() if name.endswith(".m")}
    assert magnitudes.keys() == file.magnitudes.keys()
    assert all(torch.equal(tensor, file.magnitudes[path]) for path, tensor in magnitudes.items())


def test_the_text_model_of_a_wrapper_has_mlx_lms_name(tmp_path: Path) -> None:
    tensors = export(save_wrapper(tmp_path / "base", "qwen2_5_vl"), tmp_path, "lora")[1]
    assert {name.partition(".layers.")[0] for name in tensors} == {"language_model.model"}
