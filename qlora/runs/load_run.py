"""Load a finished run, a checkpoint, an adapter folder or a model: what eval, generate, chat and export work on.

A base model without a run is quantized with the default settings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora.adapters import peft_files
from qlora.adapters.attach import attach, build_layers
from qlora.adapters.switch import AdapterSwitch
from qlora.data.conversations.encoder import Encoder
from qlora.data.prepare import prepare
from qlora.data.types import Example
from qlora.distributed.single import Single
from qlora.errors import AdapterError, InputError
from qlora.model.load_base import Base
from qlora.recipe.plan_recipe import NO_DATA, default_recipe
from qlora.recipe.recipe import Recipe, from_mapping
from qlora.recipe.recipe import read as read_recipe
from qlora.runs import full_model
from qlora.runs.artifacts import MANIFEST, RECIPE, read_manifest
from qlora.runs.memory_setup import Log, load_base, plan_if_known
from qlora.training.checkpoint import POSITION, WEIGHT_FILES, find_damage
from qlora.utils.atomic_files import is_bare_name, sha256_of


@dataclass(frozen=True)
class LoadedRun:
    """A base model, its adapter if it has one, and the recipe: how the base is stored, what the data is."""

    recipe: Recipe
    base: Base
    adapter: peft_files.AdapterFile | None

    @property
    def encoder(self) -> Encoder:
        """Tokenizer, template and loss mask as in training."""
        data = self.recipe.data
        return Encoder(self.base.tokenizer, data.train_on, self.recipe.model.chat_template, data.control_strings)


def load_run(name: str, adapter: str | None = None, log: Log = lambda line: None) -> LoadedRun:
    """Load a run folder, a checkpoint, an adapter folder (PEFT's too), or a model; `adapter` replaces the run's.

    InputError if the folder is none of these; AdapterError if the adapter is damaged or belongs to another base.
    """
    recipe, run_adapter = _find_run(name)
    folder = Path(adapter) if adapter else run_adapter
    if recipe.adapter.kind == "full":
        refuse_damaged(Path(recipe.model.name), log)
    file = read_verified_adapter(folder, log) if folder else None
    base = load_base(recipe, Single().device, plan_if_known(recipe), log)
    note = attach(base.model, file, base.manifest.sha256) if file else None
    if note:
        log(note)
    return LoadedRun(recipe, base, file)


def load_with_adapters(
    name: str, adapters: Mapping[str, str], log: Log = lambda line: None
) -> tuple[LoadedRun, AdapterSwitch]:
    """Load a run or a model with several adapters (name -> folder) on one base; the first adapter is active.

    InputError and AdapterError as `load_run`. All adapter files are read before the base model.
    """
    recipe, _ = _find_run(name)
    files = {adapter: read_verified_adapter(Path(folder), log) for adapter, folder in adapters.items()}
    base = load_base(recipe, Single().device, plan_if_known(recipe), log)
    switch = AdapterSwitch(base.model)
    for adapter, file in files.items():
        layers, note = build_layers(base.model, file, base.manifest.sha256)
        switch.add(adapter, layers)
        if note:
            log(note)
    switch.activate(next(iter(files), None))
    return LoadedRun(recipe, base, next(iter(files.values()), None)), switch


def find_adapter_folder(name: str) -> str | None:
    """The folder of the adapter of a run, a checkpoint or an adapter folder; None for a plain model."""
    folder = _find_run(name)[1]
    return None if folder is None else str(folder)


def _find_run(name: str) -> tuple[Recipe, Path | None]:
    """The recipe that `name` was trained with, or the default recipe of a model; and the adapter's folder."""
    folder = Path(name)
    if (folder / RECIPE).is_file():
        recipe = _read_recipe(folder)
        return _full_model_recipe(recipe, _finished(folder, recipe)) or (recipe, folder)
    if (folder / POSITION).is_file() and (folder.parent / RECIPE).is_file():
        recipe = _read_recipe(folder.parent)
        return _full_model_recipe(recipe, folder) or (recipe, folder)
    if (folder / peft_files.CONFIG).is_file():
        return default_recipe(_base_name(folder)), folder
    return default_recipe(name), None


def read_adapter(name: str) -> tuple[peft_files.AdapterFile, Recipe | None]:
    """The adapter of a run, a checkpoint or an adapter folder, without its base; and the run's recipe, if any.

    InputError if there is none; AdapterError if it is damaged.
    """
    folder = Path(name)
    recipe = next((_read_recipe(parent) for parent in (folder, folder.parent) if _has_recipe(parent, folder)), None)
    if recipe and recipe.adapter.kind == "full":
        raise AdapterError(f"{folder}: {full_model.NO_ADAPTER}")
    if recipe and folder.joinpath(RECIPE).is_file():
        _finished(folder, recipe)
    elif not (folder / peft_files.CONFIG).is_file():
        raise InputError(
            f"{folder}: not a run, a checkpoint or an adapter folder: found no {peft_files.CONFIG} and no {RECIPE}."
        )
    return read_verified_adapter(folder), recipe


def _has_recipe(parent: Path, folder: Path) -> bool:
    """Whether `parent` has the recipe of the adapter in `folder`: the folder itself, or the run of a checkpoint."""
    return (parent / RECIPE).is_file() and (parent == folder or (folder / POSITION).is_file())


def _read_recipe(folder: Path) -> Recipe:
    return read_recipe(folder / RECIPE)[0]


def _full_model_recipe(recipe: Recipe, folder: Path) -> tuple[Recipe, None] | None:
    """With adapter.kind full, the recipe with `folder` as its model; None for a run with an adapter."""
    if recipe.adapter.kind != "full":
        return None
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": str(folder)})}), None


def _finished(folder: Path, recipe: Recipe) -> Path:
    """The run folder. InputError without the trained weights, or without run.json, which is written last."""
    weights = full_model.CONFIG if recipe.adapter.kind == "full" else peft_files.WEIGHTS
    missing = next((name for name in (weights, MANIFEST) if not (folder / name).is_file()), None)
    if missing is None:
        return folder
    checkpoints = sorted(path.name for path in folder.glob("checkpoint-*"))
    hint = f" Use its newest checkpoint, {folder / checkpoints[-1]}." if checkpoints else ""
    raise InputError(f"{folder}: the run is not finished: it has no {missing}.{hint}")


def _base_name(folder: Path) -> str:
    name = peft_files.read(folder).config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise AdapterError(
            f"{folder / peft_files.CONFIG}: base_model_name_or_path names no base model. Use MODEL --adapter {folder}."
        )
    return name


def read_verified_adapter(folder: Path, log: Log = lambda line: None) -> peft_files.AdapterFile:
    """The adapter of a folder, after its files were verified by `refuse_damaged`."""
    refuse_damaged(folder, log)
    return peft_files.read(folder)


def refuse_damaged(folder: Path, log: Log = lambda line: None) -> None:
    """AdapterError if a file has not the sha256 of the manifest. For an edited recipe only a line is logged."""
    if (folder / POSITION).is_file():
        reason = find_damage(folder)
        if reason:
            raise AdapterError(f"{folder}: {reason}.")
    for name, expected in _manifest_digests(folder).items():
        path = folder / name
        if not path.is_file() or sha256_of(path) == expected:
            continue
        if name == RECIPE:
            log(f"{path} was edited after the run; the edited recipe is used.")
        else:
            raise AdapterError(f"{path} is damaged: its sha256 is not the one in {folder / MANIFEST}.")


def _manifest_digests(folder: Path) -> dict[str, str]:
    """The sha256 of every file in a run's manifest; empty for a folder without one."""
    path = folder / MANIFEST
    try:
        manifest = read_manifest(folder)
        if manifest is None:
            return {}
        files = dict(manifest["files"])
    except InputError as error:
        raise AdapterError(str(error)) from error
    except (ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{path} is damaged: {error!r}.") from error
    wrong = next((name for name in files if not is_bare_name(name)), None)
    if wrong is not None or not any(files.keys() >= names for names in WEIGHT_FILES):
        raise AdapterError(f"{path} is damaged: `files` must name the adapter's files, found {str(wrong)[:80]!r}.")
    return {name: str(digest) for name, digest in files.items()}


def has_data(run: LoadedRun) -> bool:
    """Whether the recipe names training data."""
    return run.recipe.data.train[0].path != NO_DATA


def held_out_examples(run: LoadedRun, data: str | None) -> Sequence[Example]:
    """The examples of `data` (a file, folder or hub name), else the run's held-out ones."""
    section, seed = run.recipe.data, run.recipe.train.seed
    if data:
        settings = {"train": data, "eval_fraction": 0.0, "packing": False, "max_length": section.max_length}
        section = from_mapping({"model": run.recipe.model.name, "data": settings}, "--data")[0].data
        return prepare(section, run.encoder, seed).train
    if not has_data(run):
        raise InputError(
            "--data is missing: a model without a run has no held-out examples. Name a file, folder or hub data set."
        )
    prepared = prepare(section, run.encoder, seed)
    return prepared.eval or prepared.train
