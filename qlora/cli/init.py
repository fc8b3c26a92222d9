"""`qlora init`: a first recipe from a few answers."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from qlora.cli.app import app, log

MODEL, GPU, DATA = "--model", "--gpu", "--data"


@app.command()
def init(
    model: Annotated[str | None, typer.Option(MODEL, help="hub name or folder of the base model")] = None,
    gpu: Annotated[str | None, typer.Option(GPU, help="GPU memory, such as 24GiB; default: this machine's")] = None,
    data: Annotated[str | None, typer.Option(DATA, help="your data: a file, folder, glob or hub name")] = None,
    ram: Annotated[str | None, typer.Option(help="host memory, such as 64GiB; default: this machine's")] = None,
    out: Annotated[str, typer.Option("-o", "--out", metavar="FILE", help="never overwritten")] = "recipe.yaml",
) -> None:
    """Write a recipe that fits a model, a GPU and data, with every line explained; asks for missing options.

    Example: qlora init --model Qwen/Qwen3-0.6B --gpu 8GiB --data data/train.jsonl -o my.yaml
    """
    from qlora.utils.paths import require_writable_file

    require_writable_file(Path(out), "--out", new=True)
    interactive = sys.stdin.isatty() and None in (model, data)
    model = model or _ask(MODEL, "Base model (hub name or folder)", "Qwen/Qwen3-0.6B")
    data = data or _ask(DATA, "Your data (file, folder or hub name)", "data/train.jsonl")
    if interactive and gpu is None:
        gpu = _ask(GPU, "Memory of your GPU, such as 24GiB (here: the GPU of this machine)", "here")
    gpu = None if gpu == "here" else gpu
    _check(model, data, (gpu, ram))
    from qlora.recipe.suggest import InitRequest, suggest_recipe, summary, write_recipe

    recipe = suggest_recipe(InitRequest(model, data, gpu, ram, out))
    write_recipe(recipe, out)
    for line in summary(recipe, out):
        log(line)


def _check(model: str, data: str, sizes: Iterable[str | None]) -> None:
    """InputError for an option that can't be used, before anything heavy is imported."""
    from qlora.errors import InputError
    from qlora.recipe.check_paths import path_problems
    from qlora.recipe.recipe import from_mapping
    from qlora.utils.byte_sizes import size_bytes

    for size in filter(None, sizes):
        size_bytes(size)
    options = {"model.name": MODEL, "data": DATA, "data.train": DATA}
    settings, _ = from_mapping({"model": model, "data": {"train": data}})
    for key, message in path_problems(settings, ("model.name", "data")):
        raise InputError(f"{options[key]}: {message}")


def _ask(option: str, question: str, default: str) -> str:
    """The typed answer; without a terminal the option must be passed."""
    from qlora.errors import InputError

    if not sys.stdin.isatty():
        raise InputError(f"{option} is missing, and stdin is not a terminal. Pass it, for example {option} {default}.")
    return str(typer.prompt(question, default=default, err=True))
