"""A machine without the modules and calls of POSIX: everything is imported, and a run trains and is evaluated."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.paths import ROOT
from support.small_runs import recipe_of, write_records

from qlora.recipe.recipe import dump

CODE = r"""
import builtins, importlib, os, pkgutil, signal, sys
import accelerate, bitsandbytes, datasets, psutil, torch  # libraries handle their platforms themselves
from accelerate import Accelerator
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama import modeling_llama, tokenization_llama
from torch.utils import checkpoint
import torch._dynamo, torch.distributed.fsdp

HIDDEN = {"resource", "fcntl", "pwd", "grp", "termios", "tty"}
real_import = builtins.__import__

def without_posix(name, globals=None, *arguments, **keywords):
    if name in HIDDEN and str((globals or {}).get("__name__")).startswith("qlora"):
        raise ImportError(name)
    return real_import(name, globals, *arguments, **keywords)

builtins.__import__ = without_posix
for name in ("fork", "sysconf", "sched_getaffinity", "getuid"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("setitimer", "SIGALRM", "SIGPROF", "SIGVTALRM", "SIGKILL", "SIGUSR1"):
    delattr(signal, name)

import qlora
left_out = ("qlora.__main__", "qlora.runs.harness_model")  # the extra lm-eval, as Triton, is not installed everywhere
for module in pkgutil.walk_packages(qlora.__path__, "qlora."):
    if module.name not in left_out and not module.name.endswith("_kernel"):
        importlib.import_module(module.name)

from qlora.cli.app import run
sys.exit(run(["train", sys.argv[1]]) or run(["eval", sys.argv[2], "--data", sys.argv[3]]))
"""


@pytest.mark.slow  # `make lowest` runs it
def test_every_module_imports_and_a_run_trains_without_posix(zoo: Callable[..., Path], tmp_path: Path) -> None:
    data = write_records(tmp_path / "records.jsonl", 6)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump(recipe_of(zoo("llama"), data, tmp_path / "run", "train.max_steps=2", "train.save_every=1")))
    arguments = [str(recipe), str(tmp_path / "run"), str(data)]
    result = subprocess.run([sys.executable, "-c", CODE, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "run" / "run.json").is_file()
