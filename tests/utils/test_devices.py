"""One module asks devices what they have; QLORA_DEVICE names the device of a run."""

import re
from pathlib import Path

import pytest
import torch
from support.paths import ROOT
from support.pretended_gpu import pretended_gpu

from qlora.errors import InputError
from qlora.utils.devices import (
    available_gpus,
    capability,
    device_count,
    device_name,
    device_type,
    has_bfloat16,
    memory_bytes,
    peak_allocated_bytes,
    release_cache,
    run_device,
    synchronize,
)

# Copies on a CUDA stream, its timers and its energy counter have no counterpart on other devices.
CUDA_ONLY = ("memory/copy_stream.py", "memory/energy.py", "quant/cuda_dequantize.py", "model/kernels/kernel_choice.py")
CPU = torch.device("cpu")


def test_no_other_module_asks_a_device() -> None:
    pattern = re.compile(r"\btorch\.(cuda|xpu|mps)\.\w+")
    package = ROOT / "qlora"
    askers = {path.relative_to(package).as_posix() for path in package.rglob("*.py") if has_question(path, pattern)}
    assert askers <= {"utils/devices.py", *CUDA_ONLY}


def has_question(path: Path, pattern: re.Pattern[str]) -> bool:
    """Whether a line of code, apart from docstrings' code quotes, has the pattern."""
    lines = (line for line in path.read_text(encoding="utf-8").splitlines() if "`torch." not in line)
    return any(pattern.search(line) for line in lines)


def test_a_cpu_has_no_memory_of_its_own_and_nothing_to_wait_for() -> None:
    assert (available_gpus(), device_type(), run_device(), device_count("cpu")) == ([], "cpu", CPU, 1)
    assert (device_name(CPU), capability(CPU), has_bfloat16(CPU)) == ("cpu", None, True)
    assert memory_bytes(CPU) is None and peak_allocated_bytes(CPU) is None
    synchronize(CPU)
    release_cache(CPU)


def test_a_gpu_is_taken_unless_the_variable_names_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended_gpu(capability=(7, 5)):
        gpu = run_device()
        assert (available_gpus(), gpu.type, device_count("cuda")) == (["cuda"], "cuda", 1)
        assert capability(gpu) == (7, 5) and not has_bfloat16(gpu)
        free, total = memory_bytes(gpu) or (0, 0)
        assert 0 < free <= total and peak_allocated_bytes(gpu) is not None
        monkeypatch.setenv("QLORA_DEVICE", "cpu")
        assert device_type() == "cpu"


@pytest.mark.parametrize("name", ["cuda", "xpu", "mps", "tpu"])
def test_a_device_that_is_not_here_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_DEVICE", name)
    with pytest.raises(InputError, match=f"QLORA_DEVICE={name}: not a device of this machine. Allowed here: cpu"):
        device_type()
