"""A finished run opened again, or a model as the defaults quantise it: what eval, generate and export work on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora.runs import full_model
from qlora.adapters import peft_files
from qlora.adapters.switch import AdapterSwitch
from qlora.runs.artifacts import MANIFEST, RECIPE
from qlora.model.load_base import Base
from qlora.data.prepare import prepare
from qlora.data.conversations.encoder import Encoder
from qlora.data.types import Example
from qlora.distributed.single import Single
from qlora.errors import AdapterError, InputError
from qlora.utils.atomic_files import plain_name, read_json, sha256_of
from qlora.runs.memory_setup import load_base, plan_here
from qlora.recipe.recipe import Recipe, from_mapping
from qlora.recipe.recipe import read as read_recipe
from qlora.training.checkpoint import POSITION, TRAINED, broken

Say = Callable[[str], None]
NO_DATA = "-"  # the training set of a model that has no run


@dataclass(frozen=True)
class LoadedRun:
    """A base with or without an adapter, and the recipe that says how it is stored and what data it knows."""

    recipe: Recipe
    base: Base
    adapter: peft_files.AdapterFile | None

    @property
    def encoder(self) -> Encoder:
        """Text to tokens, as in training."""
        return Encoder(self.base.tokenizer, self.recipe.data.train_on, self.recipe.model.chat_template)


def load_run(name: str, adapter: str | None = None, say: Say = lambda line: None) -> LoadedRun:
    """Open a run folder, a checkpoint, an adapter folder of PEFT's, or a model; `adapter` replaces its own.

    InputError if the folder is none of these; AdapterError if the adapter is damaged or belongs to another base.
    """
    recipe, own = _find(name)
    folder = Path(adapter) if adapter else own
    if recipe.adapter.kind == "full":
        refuse_damaged(Path(recipe.model.name), say)
    file = intact(folder, say) if folder else None
    base = load_base(recipe, Single().device, plan_here(recipe), say)
    note = peft_files.attach(base.model, file, base.manifest.sha256) if file else None
    if note:
        say(note)
    return LoadedRun(recipe, base, file)


def load_with_adapters(name: str, adapters: Mapping[str, str], say: Say = lambda line: None) -> tuple[LoadedRun, AdapterSwitch]:
    """Open a run or a model with several adapters on one base, by name -> folder; the first one acts.

    InputError and AdapterError as `load_run`; all files are read before the base is.
    """
    recipe, _ = _find(name)
    files = {each: intact(Path(folder), say) for each, folder in adapters.items()}
    base = load_base(recipe, Single().device, plan_here(recipe), say)
    switch = AdapterSwitch(base.model)
    for each, file in files.items():
        layers, note = peft_files.fitted(base.model, file, base.manifest.sha256)
        switch.hold(each, layers)
        if note:
            say(note)
    switch.use(next(iter(files), None))
    return LoadedRun(recipe, base, next(iter(files.values()), None)), switch


def own_adapter(name: str) -> str | None:
    """The folder of the adapter that a run, a checkpoint or an adapter folder is; None for a plain model."""
    own = _find(name)[1]
    return None if own is None else str(own)


def _find(name: str) -> tuple[Recipe, Path | None]:
    """The recipe that `name` was trained by, or the defaults around it; and its adapter's folder."""
    folder = Path(name)
    if (folder / RECIPE).is_file():
        recipe = _recipe_of(folder)
        return _whole(recipe, _finished(folder, recipe)) or (recipe, folder)
    if (folder / POSITION).is_file() and (folder.parent / RECIPE).is_file():
        recipe = _recipe_of(folder.parent)
        return _whole(recipe, folder) or (recipe, folder)
    if (folder / peft_files.CONFIG).is_file():
        return _defaults(_base_named_by(folder)), folder
    return _defaults(name), None


def read_adapter(name: str) -> tuple[peft_files.AdapterFile, Recipe | None]:
    """The adapter of a run, a checkpoint or an adapter folder, its base left alone; and its run's recipe, if any.

    InputError if there is none; AdapterError if it is damaged.
    """
    folder = Path(name)
    recipe = next((_recipe_of(place) for place in (folder, folder.parent) if _speaks_for(place, folder)), None)
    if recipe and recipe.adapter.kind == "full":
        raise AdapterError(f"{folder}: {full_model.ADAPTERLESS}")
    if recipe and folder.joinpath(RECIPE).is_file():
        _finished(folder, recipe)
    elif not (folder / peft_files.CONFIG).is_file():
        raise InputError(
            f"{folder}: is no run, checkpoint or adapter folder: it has no {peft_files.CONFIG} and no {RECIPE}."
        )
    return intact(folder), recipe


def _speaks_for(place: Path, folder: Path) -> bool:
    """Whether the recipe at `place` is that of the adapter in `folder`: its own, or the run's of a checkpoint."""
    return (place / RECIPE).is_file() and (place == folder or (folder / POSITION).is_file())


def _recipe_of(folder: Path) -> Recipe:
    return read_recipe(folder / RECIPE)[0]


def _defaults(model: str) -> Recipe:
    return from_mapping({"model": model, "data": {"train": NO_DATA}}, where="defaults")[0]


def _whole(recipe: Recipe, folder: Path) -> tuple[Recipe, None] | None:
    """The recipe of a run that trained every weight, with the folder it left as its model; None for an adapter's."""
    if recipe.adapter.kind != "full":
        return None
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": str(folder)})}), None


def _finished(folder: Path, recipe: Recipe) -> Path:
    """A run's folder, if what it trained is there, and run.json, which is written last."""
    trained = full_model.CONFIG if recipe.adapter.kind == "full" else peft_files.WEIGHTS
    lacking = next((name for name in (trained, MANIFEST) if not (folder / name).is_file()), None)
    if lacking is None:
        return folder
    saved = sorted(path.name for path in folder.glob("checkpoint-*"))
    hint = f" Its newest checkpoint is {folder / saved[-1]}; name that." if saved else ""
    raise InputError(f"{folder}: the run is not finished, it has no {lacking}.{hint}")


def _base_named_by(folder: Path) -> str:
    name = peft_files.read(folder).config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise AdapterError(
            f"{folder / peft_files.CONFIG}: base_model_name_or_path names no base. Use MODEL --adapter {folder}."
        )
    return name


def intact(folder: Path, say: Say = lambda line: None) -> peft_files.AdapterFile:
    """The adapter of a folder, checked against the sha256 that its run or checkpoint wrote down."""
    refuse_damaged(folder, say)
    return peft_files.read(folder)


def refuse_damaged(folder: Path, say: Say = lambda line: None) -> None:
    """AdapterError if a file is not what its run or checkpoint wrote; a recipe that was edited since is only told."""
    if (folder / POSITION).is_file():
        reason = broken(folder)
        if reason:
            raise AdapterError(f"{folder}: {reason}.")
    for name, expected in _digests(folder / MANIFEST).items():
        path = folder / name
        if not path.is_file() or sha256_of(path) == expected:
            continue
        if name == RECIPE:
            say(f"{path} is not as the run wrote it; it is read as it is now.")
        else:
            raise AdapterError(f"{path} is damaged: its sha256 is not the one in {folder / MANIFEST}.")


def _digests(path: Path) -> dict[str, str]:
    """The sha256 of every file that a run wrote down; nothing for a folder that no run has left."""
    if not path.exists():
        return {}
    try:
        files = dict(read_json(path)["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{path} is damaged: {error!r}.") from error
    wrong = next((name for name in files if not plain_name(name)), None)
    if wrong is not None or not any(files.keys() >= trained for trained in TRAINED):
        raise AdapterError(f"{path} is damaged: `files` must name the adapter's own, found {str(wrong)[:80]!r}.")
    return {name: str(digest) for name, digest in files.items()}


def has_rows(opened: LoadedRun) -> bool:
    """Whether the run knows rows of its own."""
    return opened.recipe.data.train[0].path != NO_DATA


def held_out(opened: LoadedRun, data: str | None) -> Sequence[Example]:
    """Rows to measure on: those of `data` (a file, folder or hub name), else the run's own held-out ones."""
    section, seed = opened.recipe.data, opened.recipe.train.seed
    if data:
        read_as = {"train": data, "eval_fraction": 0.0, "packing": False, "max_length": section.max_length}
        section = from_mapping({"model": opened.recipe.model.name, "data": read_as}, "--data")[0].data
        return prepare(section, opened.encoder, seed).train
    if not has_rows(opened):
        raise InputError(
            "--data is missing: a model without a run has no held-out rows. Name a file, folder or hub set."
        )
    prepared = prepare(section, opened.encoder, seed)
    return prepared.eval or prepared.train
