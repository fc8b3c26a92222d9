"""Find a run, a checkpoint, an adapter folder or a model by its path: its recipe, and the folder of its adapter.

Imports no torch, so that a wrong path is reported at once; load_run.py loads what is found here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from qlora.adapters import adapter_folder
from qlora.adapters.adapter_folder import (
    name_nested_adapters,
    name_the_base,
    read_base_name,
    refuse_file,
    require_adapter_folder,
)
from qlora.data import Source
from qlora.errors import AdapterError, BaseModelError, InputError
from qlora.model.model_folder import CONFIG, is_local
from qlora.recipe.check_paths import path_problems, source_problem
from qlora.recipe.default_recipe import default_recipe, has_data
from qlora.recipe.recipe import Recipe
from qlora.recipe.recipe import read as read_recipe
from qlora.runs.artifacts import MANIFEST, NO_ADAPTER, RECIPE
from qlora.runs.base_storage import stored_as
from qlora.runs.relative_paths import folder_of, locate_paths
from qlora.training.checkpoint_folder import POSITION, checkpoints_in
from qlora.utils.paths import similar_path

Log = Callable[[str], None]
ADAPTERS = "a run, a checkpoint or an adapter folder"
ALLOWED = "a run's folder, a checkpoint, an adapter folder, or a model (its folder or its hub name)"


@dataclass(frozen=True)
class RunFiles:
    """What a path names: the recipe it was trained with, or a model's default one; the folders of adapter and run."""

    recipe: Recipe
    adapter: Path | None
    run: Path | None = None  # the folder with the run's manifest


def find_run(name: str, adapter: str | None = None, log: Log = lambda line: None, quant: str | None = None) -> RunFiles:
    """The files of a run, a checkpoint, an adapter folder or a model; `adapter` replaces the run's.

    quant: how the base is stored instead of its recipe's way (a kind of quantizer); an exported model is not quantized
    unless it is given. InputError, with the path and what is wrong with it, if a folder or the base can't be used.
    """
    files = _find(Path(name), name, log)
    folder = Path(adapter).expanduser() if adapter else files.adapter
    recipe = stored_as(files.recipe, quant, name, files.run is None and files.adapter is None, log)
    return RunFiles(recipe, require_adapter_folder(folder) if folder else None, files.run)


def find_adapter(name: str, log: Log = lambda line: None) -> tuple[Path, Recipe | None]:
    """The adapter folder of a run or a checkpoint, or an adapter folder itself; and the run's recipe, if any.

    The base model may be missing. InputError if there is no adapter.
    """
    folder = Path(name)
    refuse_file(folder)
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise InputError(
            f"{folder} {problem}. Allowed: a run, a checkpoint or an adapter folder.{similar_path(folder)}"
        )
    run = next((parent for parent in (folder, folder.parent) if _has_recipe(parent, folder)), None)
    recipe = locate_paths(read_recipe(run / RECIPE)[0], run, log) if run else None
    if recipe and recipe.adapter.kind == "full":
        raise AdapterError(f"{folder}: {NO_ADAPTER}")
    if recipe and run == folder:
        _require_finished(folder, recipe)
    elif not (folder / adapter_folder.CONFIG).is_file():
        problem = f"found no {RECIPE} and no {adapter_folder.CONFIG}, allowed: {ADAPTERS}."
        raise InputError(f"{folder}: {problem}{name_nested_adapters(folder)}")
    return require_adapter_folder(folder), recipe


def require_adapters(adapters: Mapping[str, str]) -> Mapping[str, str]:
    """`adapters` (name -> folder). AdapterError for a folder without an adapter."""
    for folder in adapters.values():
        require_adapter_folder(Path(folder))
    return adapters


def require_examples(recipe: Recipe, data: str | None, otherwise: str = "") -> None:
    """InputError unless the path of `--data`, or without it the recipe's own data, can be found.

    otherwise: how the command does without examples.
    """
    if data:
        problem = source_problem(Source(path=data))
        if problem:
            raise InputError(f"--data: {problem}")
    elif not has_data(recipe):
        raise InputError(
            "--data is missing: a model without a run has no held-out examples. Name a file, folder or hub data set"
            f"{otherwise and f'; {otherwise}'}."
        )
    else:
        problems = path_problems(recipe, ("data",))
        if problems:
            lines = "\n".join(f"{key}: {message}" for key, message in problems)
            raise InputError(
                f"{lines}\nThe run's held-out examples are read; --data names others{otherwise and f'; {otherwise}'}."
            )


def _find(folder: Path, name: str, log: Log) -> RunFiles:
    if (folder / RECIPE).is_file():
        return _trained(folder, folder, log)
    if (folder / POSITION).is_file() and (folder.parent / RECIPE).is_file():
        return _trained(folder.parent, folder, log)
    if (folder / adapter_folder.CONFIG).is_file():
        require_adapter_folder(folder)
        return RunFiles(_recipe_of_adapter(folder, log), folder)
    refuse_file(folder)
    return RunFiles(_recipe_of_model(folder, name), None)


def _trained(run: Path, weights: Path, log: Log) -> RunFiles:
    """A run, or a checkpoint of it in `weights`; with adapter.kind full, `weights` is its model."""
    located: list[Recipe] = []

    def check(recipe: Recipe) -> list[tuple[str, str]]:
        if run == weights:
            _require_finished(run, recipe)
        if recipe.adapter.kind == "full":
            located.append(recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": str(weights)})}))
            return []
        located.append(locate_paths(recipe, run, log))
        advice = "The run's base model is needed: write its path there, or run the command where the run was trained."
        return [(key, f"{message} {advice}") for key, message in path_problems(located[0], ("model.name",))]

    read_recipe(run / RECIPE, (), check)
    (recipe,) = located
    return RunFiles(recipe, None if recipe.adapter.kind == "full" else weights, run)


def _recipe_of_adapter(folder: Path, log: Log) -> Recipe:
    """The default recipe of the base model that an adapter folder names. AdapterError if it can't be had."""
    name = read_base_name(folder)
    where = f"{folder / adapter_folder.CONFIG}: base_model_name_or_path"
    above = folder_of(name, folder)
    if above:
        log(f"{where}: {name!r} is not in this folder, and is read from {above}")
    recipe = default_recipe(str(above / name) if above else name)
    for _, message in path_problems(recipe, ("model.name",)):
        raise AdapterError(f"{where}: {message} {name_the_base(folder)}")
    return recipe


def _recipe_of_model(folder: Path, name: str) -> Recipe:
    """The default recipe of a model. BaseModelError if it can't be had."""
    if is_local(name) and not folder.expanduser().exists():
        raise BaseModelError(f"{name} does not exist. Allowed: {ALLOWED}.{similar_path(folder)}")
    if folder.is_dir() and not (folder / CONFIG).is_file():
        hint = _newest_checkpoint(folder) or name_nested_adapters(folder)
        files = f"{RECIPE}, {adapter_folder.CONFIG} or {CONFIG}"
        raise BaseModelError(f"{name}: found no {files}. Allowed: {ALLOWED}.{hint}")
    recipe = default_recipe(name)
    for _, message in path_problems(recipe, ("model.name",)):
        raise BaseModelError(f"{message} Allowed: {ALLOWED}." if "/" in name and not is_local(name) else message)
    return recipe


def _has_recipe(parent: Path, folder: Path) -> bool:
    """Whether `parent` has the recipe of the adapter in `folder`: the folder itself, or the run of a checkpoint."""
    return (parent / RECIPE).is_file() and (parent == folder or (folder / POSITION).is_file())


def _require_finished(folder: Path, recipe: Recipe) -> None:
    """InputError without the trained weights, or without run.json, which is written last."""
    weights = CONFIG if recipe.adapter.kind == "full" else adapter_folder.WEIGHTS
    missing = next((name for name in (weights, MANIFEST) if not (folder / name).is_file()), None)
    if missing is not None:
        raise InputError(f"{folder}: the run is not finished: it has no {missing}.{_newest_checkpoint(folder)}")


def _newest_checkpoint(folder: Path) -> str:
    checkpoints = checkpoints_in(folder)
    return f" Use its newest checkpoint, {checkpoints[-1]}." if checkpoints else ""
