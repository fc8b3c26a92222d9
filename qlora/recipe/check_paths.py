"""The paths, hub names and trackers of a recipe, checked before anything heavy is imported.

Every command that reads a recipe calls `read_checked` first, and imports torch after it.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path

from qlora.data import Source
from qlora.data.prompt_file import read_prompt_file
from qlora.data.reading.hub_access import require_reachable_hub
from qlora.data.reading.resolve_paths import resolve_source
from qlora.errors import DataError, InputError, RecipeError
from qlora.model.model_folder import is_local, require_model_folder
from qlora.recipe.recipe import Recipe, read
from qlora.training.checkpoint_folder import checkpoints_in, find_damage
from qlora.training.tracker_packages import missing_packages
from qlora.utils.paths import require_writable_folder, similar_path

TEMPLATE_SUFFIXES = (".jinja", ".jinja2", ".j2", ".txt")
MAX_SHOWN = 200  # characters of a path in a message about its length
Problem = tuple[str, str]  # a recipe key, and what is wrong with its path


def read_checked(
    path: str | PathLike[str], overrides: Sequence[str] = (), keys: Sequence[str] | None = None
) -> tuple[Recipe, list[str]]:
    """The recipe in a file as `read` returns it, its paths checked; `keys`: those that the command uses, None: all.

    RecipeError with a line for every problem, each at its file:line or key.
    """
    return read(path, overrides, lambda recipe: path_problems(recipe, keys))


def require_paths(recipe: Recipe, keys: Sequence[str] | None = None) -> None:
    """RecipeError with a line for every path of a recipe that can't be used."""
    problems = path_problems(recipe, keys)
    if problems:
        raise RecipeError("\n".join(f"{key}: {message}" for key, message in problems))


def require_shared_paths(recipes: Iterable[Recipe], keys: Sequence[str]) -> None:
    """`require_paths` for recipes that have most paths in common: each path is checked once."""
    distinct = {f"{recipe.model} {recipe.data.train} {recipe.data.eval}": recipe for recipe in recipes}
    for recipe in distinct.values():
        require_paths(recipe, keys)


def path_problems(recipe: Recipe, keys: Sequence[str] | None = None) -> list[Problem]:
    """Every path of a recipe that can't be used, by key."""
    problems: list[Problem] = []
    chosen = CHECKS if keys is None else keys
    for key in sorted(chosen, key="objective".__eq__):  # last, and only where all paths exist: it reads records
        try:
            problems += CHECKS[key](recipe) if key != "objective" or not problems else ()
        except OSError as error:  # a name that no file can have, a folder that this user may not read
            problems.append((key, f"{str(error.filename)[:MAX_SHOWN]}: {error.strerror}."))
    return problems


def _model(recipe: Recipe) -> Iterator[Problem]:
    """A local base model has its files; of one on the hub, config.json can be had."""
    name = recipe.model.name
    try:
        if is_local(name):
            require_model_folder(Path(name).expanduser())
        else:
            from qlora.model.download import find_config  # imports the hub's client

            find_config(name, recipe.model.revision)
    except InputError as error:
        yield "model.name", str(error).removeprefix("model: ")


def _chat_template(recipe: Recipe) -> Iterator[Problem]:
    """A template that is written as a path exists; other names are looked up in the tokenizer later."""
    path = Path(recipe.model.chat_template)
    if (len(path.parts) > 1 or path.suffix in TEMPLATE_SUFFIXES) and not path.is_file():
        message = f"no file {path}. Allowed: auto, a Jinja file, or the name of a template of the model."
        yield "model.chat_template", message + similar_path(path)


def _data(recipe: Recipe) -> Iterator[Problem]:
    for key, sources in (("data.train", recipe.data.train), ("data.eval", recipe.data.eval or ())):
        for source in sources:
            problem = source_problem(source)
            if problem:
                yield key, problem


def source_problem(source: Source) -> str | None:
    """Why a data source can't be used, as far as its path goes. A hub data set is not looked up."""
    try:
        resolved = resolve_source(source)
        if resolved.hub:
            require_reachable_hub(resolved.hub)
        unreadable = next((name for name in resolved.files if not os.access(name, os.R_OK)), None)
        if unreadable:
            return f"{unreadable}: this user may not read it. Change its permissions."
    except DataError as error:
        return str(error)
    return None


def _objective(recipe: Recipe) -> Iterator[Problem]:
    """The records are of the kind that the objective compares; its reference is an adapter."""
    from qlora.recipe.check_answers import answer_problems  # imports the readers of files

    return answer_problems(recipe)


def _sample_prompts(recipe: Recipe) -> Iterator[Problem]:
    """A file of prompts exists, and each of its lines holds one."""
    setting = recipe.train.sample_prompts
    try:
        if isinstance(setting, str):
            read_prompt_file(setting)
    except DataError as error:
        yield "train.sample_prompts", str(error)


def _report_to(recipe: Recipe) -> Iterator[Problem]:
    """The trackers are installed: a run starts without a missing one, and says nothing."""
    missing = " ".join(missing_packages(recipe.train.report_to))
    if missing:
        yield "train.report_to", f"not installed: {missing}. Run `pip install {missing}`, or remove it from the list."


def _resume(recipe: Recipe) -> Iterator[Problem]:
    """The folder to resume from is a complete checkpoint. Of several machines, only the first needs it."""
    setting, output = recipe.train.resume, Path(recipe.train.output)
    if setting in ("auto", "never") or not on_first_machine():
        return
    folder = Path(setting)
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        yield "train.resume", f"{folder} {problem}. {_resume_advice(output) or similar_path(folder)}".strip()
    elif checkpoints_in(folder):
        yield "train.resume", f"{folder} is a run, not a checkpoint. {_resume_advice(folder)}"
    else:
        damage = find_damage(folder, hashes=False)
        if damage:
            yield "train.resume", f"{folder} is not a complete checkpoint: {damage}. {_resume_advice(output)}"


def _resume_advice(output: Path) -> str:
    newest = [f" (here: {folder})" for folder in checkpoints_in(output)[-1:]]
    return f"Allowed: a checkpoint folder{''.join(newest)}, auto (the newest of train.output), or never (a new run)."


def _output(recipe: Recipe) -> Iterator[Problem]:
    """The run folder can be created or written. Of several machines, only the first writes it."""
    try:
        if on_first_machine():
            require_writable_folder(Path(recipe.train.output))
    except InputError as error:
        yield "train.output", str(error)


def on_first_machine() -> bool:
    """Whether rank 0 runs on this machine. All its ranks then find the same problem, and one of them reports it."""
    return os.environ.get("RANK", "0") == os.environ.get("LOCAL_RANK", "0")


CHECKS: Mapping[str, Callable[[Recipe], Iterator[Problem]]] = {
    "model.name": _model,
    "model.chat_template": _chat_template,
    "data": _data,
    "objective": _objective,
    "train.sample_prompts": _sample_prompts,
    "train.report_to": _report_to,
    "train.resume": _resume,
    "train.output": _output,
}
ENCODING = ("model.name", "model.chat_template", "data", "objective")  # what is read to make training examples
