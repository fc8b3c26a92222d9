"""Load a finished run, a checkpoint, an adapter folder or a model: what eval, generate, chat and export work on.

A base model without a run is quantized with the default settings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from qlora.adapters import peft_files
from qlora.adapters.attach import attach, build_layers
from qlora.adapters.switch import AdapterSwitch
from qlora.data.conversations.encoder import Encoder
from qlora.data.pairs import chosen_answers
from qlora.data.prepare import Prepared, prepare
from qlora.data.types import Example
from qlora.distributed.single import Single
from qlora.errors import AdapterError, InputError
from qlora.model.float16_products import multiply_in_float16
from qlora.model.lm_head import shares_prefixes
from qlora.model.load_base import Base
from qlora.recipe.dataset_profile import build_encoder
from qlora.recipe.recipe import Recipe, from_mapping
from qlora.runs.artifacts import MANIFEST, RECIPE, read_manifest
from qlora.runs.find_run import RunFiles, find_adapter, find_run, require_examples
from qlora.runs.foreign_adapter import fit_to, with_own_tokenizer
from qlora.runs.general_text import general_examples
from qlora.runs.memory_setup import Log, load_base, plan_if_known
from qlora.runs.trained_template import with_trained_template
from qlora.training.checkpoint_folder import POSITION, WEIGHT_FILES, find_damage
from qlora.training.loss import TokenLoss
from qlora.training.overflow_map import choose_products
from qlora.utils.atomic_files import is_bare_name, sha256_of

DAMAGED = "Use an intact copy of the folder, or another checkpoint of the run."


@dataclass(frozen=True)
class LoadedRun:
    """A base model, its adapter if it has one, and the recipe: how the base is stored, what the data is."""

    recipe: Recipe
    base: Base
    adapter: peft_files.AdapterFile | None
    tokenizer_folder: Path | None = None  # where the tokenizer is from, if not from the base

    @cached_property
    def encoder(self) -> Encoder:
        """Tokenizer, template and loss mask as in training."""
        return build_encoder(self.recipe, self.base.tokenizer)


def load_run(run: str | RunFiles, adapter: str | None = None, log: Log = lambda line: None) -> LoadedRun:
    """Load a run folder, a checkpoint, an adapter folder (PEFT's too), or a model; `adapter` replaces the run's.

    InputError if the folder is none of these; AdapterError if the adapter is damaged or belongs to another base.
    """
    files = find_run(run, adapter, log) if isinstance(run, str) else run
    recipe = files.recipe
    if recipe.adapter.kind == "full":
        refuse_damaged(Path(recipe.model.name), log)
    file = read_verified_adapter(files.adapter, log) if files.adapter else None
    base = load_base(recipe, Single().device, plan_if_known(recipe), log)
    recipe = with_trained_template(recipe, base, files.run, log)
    if file is None:
        return _ready(LoadedRun(recipe, base, None), log)
    file = fit_to(base, file, log)
    note = attach(base.model, file, base.manifest.sha256)
    if note:
        log(note)
    tokenized = with_own_tokenizer(base, file.folder, log)
    return _ready(LoadedRun(recipe, tokenized or base, file, file.folder if tokenized else None), log)


def load_with_adapters(
    run: str | RunFiles, adapters: Mapping[str, str], log: Log = lambda line: None
) -> tuple[LoadedRun, AdapterSwitch]:
    """Load a run or a model with several adapters (name -> folder) on one base; the first adapter is active.

    InputError and AdapterError as `load_run`. All adapter files are read before the base model.
    """
    run_files = find_run(run, None, log) if isinstance(run, str) else run
    files = {adapter: read_verified_adapter(Path(folder), log) for adapter, folder in adapters.items()}
    base = load_base(run_files.recipe, Single().device, plan_if_known(run_files.recipe), log)
    recipe = with_trained_template(run_files.recipe, base, run_files.run, log)
    files = {adapter: fit_to(base, file, log) for adapter, file in files.items()}
    switch = AdapterSwitch(base.model)
    for adapter, file in files.items():
        if with_own_tokenizer(base, file.folder, lambda line: None):
            log(f"careful: {file.folder} has its own tokenizer or chat template; several adapters share the base's")
        layers, note = build_layers(base.model, file, base.manifest.sha256)
        switch.add(adapter, layers)
        if note:
            log(note)
    switch.activate(next(iter(files), None))
    return _ready(LoadedRun(recipe, base, next(iter(files.values()), None)), log), switch


def _ready(run: LoadedRun, log: Log) -> LoadedRun:
    """The run, which multiplies as in training, and whose answers stop at the token that closes an answer there."""
    if run.base.dtype == torch.float16:
        paths = _paths_in_float32(run.adapter.folder) if run.adapter else None
        if paths is None:
            log(str(choose_products(TokenLoss(run.base.model), general_examples(run.encoder), Single())))
        else:
            multiply_in_float16(run.base.model, paths)
    end = run.encoder.end_token_id
    stops = {*run.base.stop_token_ids, *([] if end is None else [end])}
    return replace(run, base=replace(run.base, stop_token_ids=tuple(sorted(stops))))


def _paths_in_float32(folder: Path) -> set[str] | None:
    """The matrices that a run in float16 computed in float32; None if its folder does not say so."""
    overflow_map = (read_manifest(folder) or {}).get("float16")
    paths = overflow_map.get("in_float32") if isinstance(overflow_map, dict) else None
    return set(paths) if isinstance(paths, dict) else None


def read_adapter(name: str, log: Log = lambda line: None) -> tuple[peft_files.AdapterFile, Recipe | None]:
    """The adapter of a run, a checkpoint or an adapter folder, without its base; and the run's recipe, if any.

    InputError if there is none; AdapterError if it is damaged.
    """
    folder, recipe = find_adapter(name, log)
    return read_verified_adapter(folder, log), recipe


def read_verified_adapter(folder: Path, log: Log = lambda line: None) -> peft_files.AdapterFile:
    """The adapter of a folder, after its files were verified by `refuse_damaged`."""
    refuse_damaged(folder, log)
    file = peft_files.read(folder)
    for note in file.notes:
        log(note)
    return file


def refuse_damaged(folder: Path, log: Log = lambda line: None) -> None:
    """AdapterError if a file has not the sha256 of the manifest. For an edited recipe only a line is logged."""
    if (folder / POSITION).is_file():
        reason = find_damage(folder)
        if reason:
            raise AdapterError(f"{folder}: {reason}. {DAMAGED}")
    for name, expected in _manifest_digests(folder).items():
        path = folder / name
        if not path.is_file() or sha256_of(path) == expected:
            continue
        if name == RECIPE:
            log(f"{path} was edited after the run; the edited recipe is used.")
        else:
            raise AdapterError(f"{path} is damaged: its sha256 is not the one in {folder / MANIFEST}. {DAMAGED}")


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
        raise AdapterError(f"{path} is damaged: {error!r}. {DAMAGED}") from error
    wrong = next((name for name in files if not is_bare_name(name)), None)
    if wrong is not None or not any(files.keys() >= names for names in WEIGHT_FILES):
        raise AdapterError(
            f"{path} is damaged: `files` must name the adapter's files, found {str(wrong)[:80]!r}. {DAMAGED}"
        )
    return {name: str(digest) for name, digest in files.items()}


def held_out_examples(run: LoadedRun, data: str | None) -> Sequence[Example]:
    """The examples of `data` (a file, folder or hub name), else the run's held-out ones: of pairs, the chosen sides."""
    require_examples(run.recipe, data)
    prepared = _prepared(run, data, None if data else run.recipe.objective.sided_format)
    return chosen_answers(prepared.train if data else prepared.eval or prepared.train)


def held_out_pairs(run: LoadedRun, data: str | None) -> Sequence[Example]:
    """The preference pairs of `data`, else the run's held-out ones. InputError if the run's data are no pairs."""
    require_examples(run.recipe, data)
    if not data and run.recipe.objective.sided_format != "preference":
        kind = run.recipe.objective.kind
        raise InputError(
            f"--task preference: this run's data are no pairs (objective.kind {kind}). Name some with --data."
        )
    prepared = _prepared(run, data, "preference")
    prepared.report.raise_for_problems()
    return prepared.train if data else prepared.eval or prepared.train


def _prepared(run: LoadedRun, data: str | None, sided_format: str | None) -> Prepared:
    section, seed, shares = run.recipe.data, run.recipe.train.seed, shares_prefixes(run.base.model)
    if data:
        settings = {"train": data, "eval_fraction": 0.0, "packing": False, "max_length": section.max_length}
        section = from_mapping({"model": run.recipe.model.name, "data": settings}, "--data")[0].data
    return prepare(section, run.encoder, seed, shares_prefixes=shares, sided_format=sided_format)
