"""`qlora resize` and `qlora combine`: a lower rank, or a weighted sum of adapters, written as a new adapter folder."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qlora._version import __version__
from qlora.adapters.peft_config import MAX_RANK
from qlora.adapters.peft_files import AdapterFile
from qlora.adapters.plain_lora import (
    Pairs,
    concatenate,
    fold_scaling,
    joint_targets,
    largest_rank,
    truncate,
    write_plain_lora,
)
from qlora.adapters.spectrum import Spectrum, spectrum
from qlora.errors import AdapterError, InputError
from qlora.model.tokenizer_files import write_tokenizer
from qlora.recipe.recipe import Recipe, dump
from qlora.runs.adapter_names import WeightedAdapter
from qlora.runs.artifacts import MANIFEST, MODEL_CARD, RECIPE
from qlora.runs.load_run import read_adapter
from qlora.runs.memory_setup import Log
from qlora.runs.report.export_model_card import derived_model_card
from qlora.runs.report.model_card import Loading
from qlora.utils.atomic_files import sha256_manifest, write_json, write_text
from qlora.utils.atomic_folders import atomic_folder, require_new_folder

# Adapter settings of a plain LoRA.
PLAIN = {"kind": "lora", "rank_pattern": None, "alpha_pattern": None, "save_modules": (), "tokens": ()}


def resize(name: str, out: str, rank: int, log: Log = lambda line: None) -> dict[str, Any]:
    """Write the best approximation of `rank` to every update; returns the energy that is kept.

    InputError if the rank is not lower than the adapter's, or OUT exists.
    """
    file, recipe = read_adapter(name, log)
    folder = require_new_folder(Path(out))
    pairs = fold_scaling(file)
    before = largest_rank(pairs)
    if not 1 <= rank < before:
        raise InputError(f"--rank: found {rank}, allowed: 1 to {before - 1}. The adapter in {name} has rank {before}.")
    spectra = _spectra(pairs)
    kept = {path: layer.energy(rank) for path, layer in spectra.items()}
    energy, worst = _energy_kept(spectra, rank), min(kept, key=lambda path: kept[path])
    source = {"path": name, "rank": before, "energy_kept": energy}
    _write_folder(folder, truncate(pairs, rank), [file], recipe, {"resized": source})
    log(
        f"rank {before} -> {rank}: {1 - energy:.3%} of the energy is lost, "
        f"at most {1 - kept[worst]:.3%} of a layer's ({worst})"
    )
    return {
        "path": str(folder), "rank": rank, "rank_before": before, "energy_kept": energy,
        "layers": [{"name": path, "energy_kept": share} for path, share in kept.items()],
    }  # fmt: skip


def combine(
    out: str, terms: Sequence[WeightedAdapter], rank: int | None, log: Log = lambda line: None
) -> dict[str, Any]:
    """Write the weighted sum of several adapters: exact, with their ranks added, or its best approximation of `rank`.

    AdapterError if they belong to different bases; InputError if OUT exists.
    """
    adapters = [read_adapter(term.path, log) for term in terms]
    files, folder = [file for file, _ in adapters], require_new_folder(Path(out))
    source = _common_base(terms, files, log)
    pairs = concatenate([fold_scaling(file, term.weight) for file, term in zip(files, terms, strict=True)])
    exact_rank = largest_rank(pairs)
    if exact_rank > MAX_RANK or (rank is not None and rank < 1):
        raise InputError(f"--rank: found {rank}, allowed: 1 to {exact_rank}, the ranks of all adapters together.")
    if rank is None or rank >= exact_rank:
        energy, loss = 1.0, "exactly, by concatenation"
    else:
        energy, pairs = _energy_kept(_spectra(pairs), rank), truncate(pairs, rank)
        loss = f"{1 - energy:.3%} of the energy is lost"
    parts = {"parts": [{"name": term.name, "path": term.path, "weight": term.weight} for term in terms]}
    _write_folder(folder, pairs, [source, *files], _common_recipe(terms, [r for _, r in adapters], log), parts)
    written_rank, exact = largest_rank(pairs), rank is None or rank >= exact_rank
    log(f"{' + '.join(f'{term.weight:g} {term.name}' for term in terms)} in rank {written_rank}, {loss}")
    return {"path": str(folder), "rank": written_rank, "energy_kept": energy, "exact": exact, **parts}


def _spectra(pairs: Pairs) -> dict[str, Spectrum]:
    return {path: spectrum(a, b, 1.0) for path, (a, b) in pairs.items()}


def _energy_kept(spectra: Mapping[str, Spectrum], rank: int) -> float:
    """The share of the whole adapter's energy that the first `rank` directions of every layer hold."""
    layers = [(layer.norm**2, layer.energy(rank)) for layer in spectra.values()]
    total = sum(energy for energy, _ in layers)
    return sum(energy * share for energy, share in layers) / total if total else 1.0


def _common_base(terms: Sequence[WeightedAdapter], files: Sequence[AdapterFile], log: Log) -> AdapterFile:
    """An adapter that identifies the base of all of them. AdapterError if they were trained on different ones."""
    known = [(term, file) for term, file in zip(terms, files, strict=True) if file.base_sha256]
    for term, file in known:
        if file.base_sha256 != known[0][1].base_sha256:
            raise AdapterError(
                f"{term.name} ({term.path}) was trained on other weights than {known[0][0].name}: base "
                f"{file.config.get('base_model_name_or_path')!r}, sha256 {str(file.base_sha256)[:12]}..., against "
                f"{str(known[0][1].base_sha256)[:12]}.... Only adapters of one base can be added."
            )
    for term, file in zip(terms, files, strict=True):
        if not file.base_sha256:
            log(f"{term.name} carries no fingerprint of its base: that it belongs to this one can't be checked.")
    _refuse_other_shapes(terms, files)
    return known[0][1] if known else files[0]


def _refuse_other_shapes(terms: Sequence[WeightedAdapter], files: Sequence[AdapterFile]) -> None:
    shapes: dict[str, tuple[str, list[int]]] = {}
    for term, file in zip(terms, files, strict=True):
        for path, (a, b) in file.pairs.items():
            shape = [b.shape[0], a.shape[1]]
            name, expected = shapes.setdefault(path, (term.name, shape))
            if expected != shape:
                raise AdapterError(
                    f"{path} is {shape} in {term.name}, but {expected} in {name}. Adapters must have one base."
                )


def _common_recipe(terms: Sequence[WeightedAdapter], recipes: Sequence[Recipe | None], log: Log) -> Recipe | None:
    """The first recipe, which says how the base is stored; None if one of the adapters has no recipe."""
    first = recipes[0]
    for term, recipe in zip(terms, recipes, strict=True):
        if recipe is None or first is None:
            log(f"{term.name if recipe is None else terms[0].name} has no recipe: none is written for the sum")
            return None
        if (recipe.quant, recipe.model.dtype) != (first.quant, first.model.dtype):
            log(f"{term.name} was trained on a base stored differently; that of {terms[0].name} is used")
    return first


def _write_folder(
    folder: Path, pairs: Pairs, files: Sequence[AdapterFile], recipe: Recipe | None, origin: Mapping[str, Any]
) -> None:
    """The folder: adapter, tokenizer files of the first adapter, recipe, manifest and model card."""
    source, rank = files[0], largest_rank(pairs)
    with atomic_folder(folder) as partial:
        write_plain_lora(partial, pairs, source, joint_targets(files))
        write_tokenizer(partial, source.folder, None)
        digests = sha256_manifest(partial)
        if recipe:
            adapter = recipe.adapter.model_copy(update=PLAIN | {"rank": rank, "alpha": float(rank)})
            write_text(partial / RECIPE, dump(recipe.model_copy(update={"adapter": adapter})))
        base = {
            "name": source.config.get("base_model_name_or_path"),
            "revision": source.config.get("revision"),
            "sha256": source.base_sha256,
        }
        manifest = {
            "qlora": __version__, "created": datetime.now(UTC).isoformat(timespec="seconds"), "base": base,
            "adapter": {"kind": "lora", "rank": rank, "alpha": rank, "paths": list(pairs)}, **origin,
            "files": digests,
        }  # fmt: skip
        write_json(partial / MANIFEST, manifest)
        write_text(partial / MODEL_CARD, derived_model_card(manifest, Loading()))
