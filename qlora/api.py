"""The Python face: load_recipe, plan, train, load, generate, export. Each is a verb of the command line, thinly.

Every function raises the errors of qlora/errors.py with the messages that the command line prints. Progress and
warnings go to stderr; `quiet=True` leaves the progress out. Nothing heavy is imported before a function needs it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from qlora.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from qlora.memory.planner.memory_plan import Plan
    from qlora.recipe.recipe import Recipe
    from qlora.runs.load_run import LoadedRun

Where = str | PathLike[str]
Target = Literal["merged", "adapter", "portable", "ollama"]


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, and its manifest as `run.json` has it."""

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def loss(self) -> float | None:
        """Mean loss of the last logged training step, in nats per trained token."""
        return _number(self.manifest, "loss")

    @property
    def eval_loss(self) -> float | None:
        """Mean held-out loss after the last step, in nats per trained token; None without held-out rows."""
        return _number(self.manifest, "eval_loss")

    @property
    def report(self) -> Path:
        """The page about it, for a browser."""
        return self.folder / "report.html"

    def __fspath__(self) -> str:
        return str(self.folder)


@dataclass(frozen=True)
class Exported:
    """An export: its folder, its bytes, and how far a written model is from the trained one (`merged`, `ollama`)."""

    folder: Path
    bytes: int
    agreement: Mapping[str, float] | None  # mean_kl in nats a token, top1 as a share, max_logit_difference, rows
    servers: Sequence[Mapping[str, Any]]  # who takes the folder as it is

    def __fspath__(self) -> str:
        return str(self.folder)


def load_recipe(source: "Where | Mapping[str, Any]", *overrides: str) -> "Recipe":
    """A recipe from a YAML file or from plain values; overrides as in `load_recipe("my.yaml", "adapter.rank=32")`.

    The result is frozen and typed: `recipe.adapter.rank`. RecipeError names every problem at once. A key of another
    trainer (`lora_r`) is read, and said on stderr.
    """
    from qlora.recipe.recipe import from_mapping, read

    if isinstance(source, Mapping):
        recipe, notes = from_mapping(source, overrides=overrides)
    else:
        recipe, notes = read(source, overrides)
    for note in notes:
        _say(note)
    return recipe


def plan(recipe: "Recipe | Where", gpu: str | None = None, gpus: int = 1, ram: str | None = None) -> "Plan":
    """Every byte of a run by owner, and the settings that fit, from config.json alone: no weight is read.

    recipe: a recipe, its file, or a model under the defaults. gpu, ram: sizes such as "24GiB"; None: this machine's.
    The result has `fits`, `peak_bytes`, `owners` (name -> bytes), `advice`, and `str(...)` as a table. BaseModelError
    if the model's shapes are not known. Source of the formulas: the docstrings of qlora/memory/.
    """
    from qlora.recipe.check import machine_of, recipe_or_model
    from qlora.recipe.planning import better, plans_of

    found = recipe_or_model(fspath(recipe), ()) if isinstance(recipe, str | PathLike) else recipe
    plans = plans_of(found, machine_of(gpu, gpus, ram))
    return plans[better(plans)]  # of the ways to share several cards


def train(recipe: "Recipe | Where", *, quiet: bool = False) -> Run:
    """Train, and return the finished run; an interrupted one goes on where it was (`train.resume`).

    DoesNotFit if the plan exceeds the memory, DataError for rows that can't be trained on, Stopped after Ctrl-C or a
    signal: the checkpoint of the last step is on disk then. Method: Dettmers et al. 2023 (QLoRA), arXiv:2305.14314.
    """
    from qlora.runs.train import train as walk

    found = load_recipe(recipe) if isinstance(recipe, str | PathLike) else recipe
    return Run(Path(found.train.output), walk(found, quiet=quiet))


def load(run: "Run | Where", adapter: Where | None = None) -> "LoadedRun":
    """A run, a checkpoint, an adapter folder or a plain model, opened for `generate` and `export`.

    The base is quantised as in training. adapter: a folder that replaces the run's own. InputError if the folder is
    none of these; AdapterError if the adapter is damaged or was trained on other weights.
    """
    from qlora.runs.load_run import load_run

    return load_run(fspath(run), None if adapter is None else fspath(adapter), _say)


@overload
def generate(
    run: "LoadedRun | Run | Where", prompt: str, *, max_new_tokens: int = ..., temperature: float = ...
) -> str: ...
@overload
def generate(
    run: "LoadedRun | Run | Where", prompt: list[str], *, max_new_tokens: int = ..., temperature: float = ...
) -> list[str]: ...
def generate(
    run: "LoadedRun | Run | Where", prompt: str | list[str], *, max_new_tokens: int = 256, temperature: float = 0.0
) -> str | list[str]:
    """The answer to a prompt, or to each of several, which share batches; each is a user's turn in the run's template.

    max_new_tokens: the longest answer. temperature: 0 is greedy; above it answers are drawn from the run's seed. Pass
    what `load` gave to answer more than once: a folder is opened anew each time. InputError for values out of range.
    """
    from qlora.data.types import Message
    from qlora.runs.evaluate_and_generate import answer_messages

    _refuse_range(max_new_tokens, temperature)
    opened = load(run) if isinstance(run, Run | str | PathLike) else run
    prompts = [prompt] if isinstance(prompt, str) else prompt
    asked = [(each, [Message("user", each)]) for each in prompts]
    texts = [str(row["text"]) for row in answer_messages(opened, asked, max_new_tokens, temperature)]
    return texts[0] if isinstance(prompt, str) else texts


def export(
    run: "LoadedRun | Run | Where",
    out: Where,
    to: Target = "merged",
    *,
    base: Literal["dequantized", "original"] = "dequantized",
    dtype: Literal["bfloat16", "float16", "float32"] | None = None,
    rows: int | None = None,
) -> Exported:
    """A run in the form that other programs load, written in one step, with what the merge changed measured on it.

    base: what the update is added to: the dequantised matrices that were trained on, or the original ones. dtype: of a
    merged model; None: what the run computed in. rows: held-out rows of the certificate; 0: none. InputError for an
    order that can't be meant or a folder that is there; QloraError if the written model is not the trained one.
    """
    from qlora.exporters import TARGETS
    from qlora.exporters.export_run import ExportRequest, export_run

    if to not in TARGETS:
        raise InputError(f"to: no {to!r}.{did_you_mean(str(to), TARGETS)}")
    opened = load(run) if isinstance(run, Run | str | PathLike) else run
    found = export_run(opened, ExportRequest(to, base, dtype, None, rows), fspath(out), _say)
    return Exported(Path(found["path"]), found["bytes"], found["agreement"], found["servers"])


def _refuse_range(max_new_tokens: int, temperature: float) -> None:
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens: found {max_new_tokens}, allowed: a whole number >= 1.")
    if not 0 <= temperature < float("inf"):
        raise InputError(f"temperature: found {temperature}, allowed: a number >= 0; 0 is greedy.")


def _number(manifest: Mapping[str, Any], key: str) -> float | None:
    found = manifest.get("result", {}).get(key)
    return None if found is None else float(found)


def _say(line: str) -> None:
    """For people, on stderr."""
    from qlora.training.run_log import console

    console().print(line, markup=False)
