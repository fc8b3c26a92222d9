"""`qlora init`: a first recipe out of a few answers."""

import sys
from typing import Annotated

import typer

from qlora.cli.app import app, say

MODEL, GPU, DATA = "--model", "--gpu", "--data"


@app.command()
def init(
    model: Annotated[str | None, typer.Option(MODEL, help="hub name or folder of the base model")] = None,
    gpu: Annotated[str | None, typer.Option(GPU, help="memory of the card, such as 24GiB; default: this one")] = None,
    data: Annotated[str | None, typer.Option(DATA, help="your rows: a file, folder, glob or hub name")] = None,
    ram: Annotated[str | None, typer.Option(help="main memory, such as 64GiB; default: what is here")] = None,
    out: Annotated[str, typer.Option("-o", "--out", metavar="FILE", help="never overwritten")] = "recipe.yaml",
) -> None:
    """Look at a model, a card and data, and write a recipe that fits, every line explained; asks for what is missing.

    Example: qlora init --model Qwen/Qwen3-0.6B --gpu 8GiB --data data/train.jsonl -o my.yaml
    """
    from qlora.recipe.suggest import Asked, begin, summary, write_recipe

    typed = sys.stdin.isatty() and None in (model, data)
    model = model or _answer(MODEL, "Base model (hub name or folder)", "Qwen/Qwen3-0.6B")
    data = data or _answer(DATA, "Your rows (file, folder or hub name)", "data/train.jsonl")
    if typed and gpu is None:
        gpu = _answer(GPU, "Memory of your card, such as 24GiB (here: the one in this machine)", "here")
    begun = begin(Asked(model, data, None if gpu == "here" else gpu, ram, out))
    write_recipe(begun, out)
    for line in summary(begun, out):
        say(line)


def _answer(option: str, question: str, default: str) -> str:
    """What a person types; a script has to say it."""
    from qlora.errors import InputError

    if not sys.stdin.isatty():
        raise InputError(f"{option} is missing: nobody is there to ask. Say it, as in {option} {default}.")
    return str(typer.prompt(question, default=default, err=True))
