"""The Python interface: load_recipe, plan, train, load, generate, export, each a thin layer over a command.

Every function raises the errors of qlora/errors.py with the messages that the command line prints. Progress and
warnings go to stderr; `quiet=True` turns the progress off. Torch is imported by the first function that needs it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from qlora.errors import InputError, did_you_mean
from qlora.exporters import MERGE_BASE, TARGETS, ExportRequest

if TYPE_CHECKING:
    from qlora.memory.planner.memory_plan import Plan
    from qlora.recipe.recipe import Recipe
    from qlora.runs.load_run import LoadedRun

StrPath = str | PathLike[str]
Target = Literal["merged", "adapter", "portable", "gguf", "gguf-adapter", "mlx", "ollama"]


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, and its manifest, the content of `run.json`."""

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def loss(self) -> float | None:
        """Mean loss of the last logged training step, in nats per trained token."""
        return _number(self.manifest, "loss")

    @property
    def eval_loss(self) -> float | None:
        """Mean held-out loss after the last step, in nats per trained token; None without held-out examples."""
        return _number(self.manifest, "eval_loss")

    @property
    def report(self) -> Path:
        """The run's report, an HTML page."""
        return self.folder / "report.html"

    def __fspath__(self) -> str:
        return str(self.folder)


@dataclass(frozen=True)
class Exported:
    """An export: folder, bytes, and the agreement of a written model with the trained one (`merged`, `ollama`)."""

    folder: Path
    bytes: int
    agreement: Mapping[str, float] | None  # mean_kl in nats per token, top1 as a share, max_logit_difference, rows
    servers: Sequence[Mapping[str, Any]]  # which servers load the folder

    def __fspath__(self) -> str:
        return str(self.folder)


def load_recipe(source: "StrPath | Mapping[str, Any]", *overrides: str) -> "Recipe":
    """A recipe from a YAML file or from plain values; overrides as in `load_recipe("my.yaml", "adapter.rank=32")`.

    The result is frozen and typed: `recipe.adapter.rank`. RecipeError names every problem at once. A key of another
    trainer (`lora_r`) is accepted, with a line on stderr.
    """
    from qlora.recipe.recipe import from_mapping, read

    if isinstance(source, Mapping):
        recipe, notes = from_mapping(source, overrides=overrides)
    else:
        recipe, notes = read(source, overrides)
    for note in notes:
        _print(note)
    return recipe


def plan(recipe: "Recipe | StrPath", gpu: str | None = None, gpus: int = 1, ram: str | None = None) -> "Plan":
    """The memory of a run by component, and the settings that fit, from config.json alone: no weight is read.

    recipe: a recipe, its file, or a model (default settings). gpu, ram: sizes such as "24GiB"; None: this machine's.
    The result has `fits`, `peak_bytes`, `owners` (name -> bytes), `advice`, and `str(...)` as a table. BaseModelError
    if the model's shapes are not known. Source of the formulas: the docstrings of qlora/memory/.
    """
    from qlora.recipe.plan_recipe import read_recipe_or_model, requested_machine
    from qlora.recipe.planning import Planner

    if isinstance(recipe, str | PathLike):
        recipe = read_recipe_or_model(fspath(recipe), ())
    return Planner(recipe).plan(requested_machine(gpu, gpus, ram))


def train(recipe: "Recipe | StrPath", *, quiet: bool = False) -> Run:
    """Train, and return the finished run; an interrupted run resumes from its newest checkpoint (`train.resume`).

    DoesNotFit if the plan exceeds the memory, DataError for data that can't be trained on, Stopped after Ctrl-C or a
    signal: the checkpoint of the last step is on disk then. Method: Dettmers et al. 2023 (QLoRA), arXiv:2305.14314.
    """
    from qlora.distributed.watchdog import report_once
    from qlora.recipe.check_paths import require_paths
    from qlora.utils.cuda_allocator import use_expandable_segments

    use_expandable_segments()
    settings = load_recipe(recipe) if isinstance(recipe, str | PathLike) else recipe
    report_once(lambda: require_paths(settings))
    from qlora.runs import train as training

    return Run(Path(settings.train.output), training.train(settings, quiet=quiet))


def load(run: "Run | StrPath", adapter: StrPath | None = None) -> "LoadedRun":
    """Load a run, a checkpoint, an adapter folder or a plain model for `generate` and `export`.

    The base model is quantized as in training. adapter: a folder that replaces the run's adapter. InputError if the
    folder is none of these; AdapterError if the adapter is damaged or was trained on other weights.
    """
    from qlora.runs.find_run import find_run

    files = find_run(fspath(run), None if adapter is None else fspath(adapter), _print)
    from qlora.runs.load_run import load_run

    return load_run(files, None, _print)


@overload
def generate(
    run: "LoadedRun | Run | StrPath", prompt: str, *, max_new_tokens: int = ..., temperature: float = ...
) -> str: ...
@overload
def generate(
    run: "LoadedRun | Run | StrPath", prompt: list[str], *, max_new_tokens: int = ..., temperature: float = ...
) -> list[str]: ...
def generate(
    run: "LoadedRun | Run | StrPath", prompt: str | list[str], *, max_new_tokens: int = 256, temperature: float = 0.0
) -> str | list[str]:
    """The answer to a prompt, or to each of several prompts in shared batches; a prompt is a user message.

    max_new_tokens: the longest answer. temperature: 0 is greedy; above 0 answers are sampled from the run's seed. Pass
    the result of `load` to generate more than once: a folder is loaded again by each call. InputError for values out of
    range.
    """
    from qlora.data.types import Message
    from qlora.runs.generate import generate_from_prompts

    _refuse_range(max_new_tokens, temperature)
    loaded = load(run) if isinstance(run, Run | str | PathLike) else run
    texts = [prompt] if isinstance(prompt, str) else prompt
    prompts = [(text, [Message("user", text)]) for text in texts]
    answers = [str(row["text"]) for row in generate_from_prompts(loaded, prompts, max_new_tokens, temperature)]
    return answers[0] if isinstance(prompt, str) else answers


def export(
    run: "LoadedRun | Run | StrPath",
    out: StrPath,
    to: Target = "merged",
    *,
    base: Literal["dequantized", "original"] = MERGE_BASE,
    dtype: Literal["bfloat16", "float16", "float32", "q8_0", "q4_0"] | None = None,
    rows: int | None = None,
) -> Exported:
    """Export a run for other programs, and measure what the merge changed.

    base: what the update is added to: the dequantized weights of training, or the original ones. dtype: of a merged
    model; None: the run's compute dtype. rows: held-out examples of the certificate; 0: no certificate. InputError for
    options that contradict each other, or a folder that exists; QloraError if the certificate is above its limit.
    """
    from qlora.exporters.export_run import export_run

    if to not in TARGETS:
        raise InputError(f"to: no {to!r}.{did_you_mean(str(to), TARGETS)}")
    loaded = load(run) if isinstance(run, Run | str | PathLike) else run
    result = export_run(loaded, ExportRequest(to, base, dtype, rows=rows), fspath(out), _print)
    return Exported(Path(result["path"]), result["bytes"], result["agreement"], result["servers"])


def _refuse_range(max_new_tokens: int, temperature: float) -> None:
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens: found {max_new_tokens}, allowed: an integer >= 1.")
    if not 0 <= temperature < float("inf"):
        raise InputError(f"temperature: found {temperature}, allowed: a number >= 0; 0 is greedy.")


def _number(manifest: Mapping[str, Any], key: str) -> float | None:
    value = manifest.get("result", {}).get(key)
    return None if value is None else float(value)


def _print(line: str) -> None:
    """Print a line on stderr."""
    from qlora.training.run_log import console

    console().print(line, markup=False)
