"""`qlora init`: a first recipe from a few answers."""

import sys
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
    from qlora.recipe.suggest import InitRequest, suggest_recipe, summary, write_recipe

    interactive = sys.stdin.isatty() and None in (model, data)
    model = model or _ask(MODEL, "Base model (hub name or folder)", "Qwen/Qwen3-0.6B")
    data = data or _ask(DATA, "Your data (file, folder or hub name)", "data/train.jsonl")
    if interactive and gpu is None:
        gpu = _ask(GPU, "Memory of your GPU, such as 24GiB (here: the GPU of this machine)", "here")
    recipe = suggest_recipe(InitRequest(model, data, None if gpu == "here" else gpu, ram, out))
    write_recipe(recipe, out)
    for line in summary(recipe, out):
        log(line)


def _ask(option: str, question: str, default: str) -> str:
    """The typed answer; without a terminal the option must be passed."""
    from qlora.errors import InputError

    if not sys.stdin.isatty():
        raise InputError(f"{option} is missing, and stdin is not a terminal. Pass it, for example {option} {default}.")
    return str(typer.prompt(question, default=default, err=True))
