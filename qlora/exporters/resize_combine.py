"""New adapters out of trained ones: one of lower rank, or several in one; each a folder that every verb takes again."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qlora._version import __version__
from qlora.adapters.peft_files import MAX_RANK, AdapterFile
from qlora.adapters.plain_lora import (
    Pairs,
    concatenated,
    folded,
    largest_rank,
    padded,
    targets_of,
    truncated,
    write_plain,
)
from qlora.adapters.spectrum import spectrum
from qlora.errors import AdapterError, InputError
from qlora.model.download import tokenizer_files
from qlora.recipe.recipe import Recipe, dump
from qlora.runs.adapter_names import Part
from qlora.runs.artifacts import CARD, MANIFEST, RECIPE
from qlora.runs.load_run import Say, read_adapter
from qlora.runs.report.export_card import reworked_card
from qlora.utils.atomic_files import manifest_of, write_bytes, write_json, write_text
from qlora.utils.atomic_folders import folder_in_one_step

# Adapter settings of what is written here.
PLAIN = {"kind": "lora", "rank_pattern": None, "alpha_pattern": None, "save_modules": (), "tokens": ()}


def resize(name: str, out: str, rank: int, say: Say = lambda line: None) -> dict[str, Any]:
    """Write the best approximation of `rank` of every update; returns the energy that was kept.

    InputError if the rank is not lower than the adapter's, or OUT is there already.
    """
    file, recipe = read_adapter(name)
    folder = free_folder(out)
    pairs = folded(file)
    before = largest_rank(pairs)
    if not 1 <= rank < before:
        raise InputError(f"--rank: found {rank}, allowed: 1 to {before - 1}. The adapter in {name} has rank {before}.")
    kept = {path: spectrum(a, b, 1.0) for path, (a, b) in pairs.items()}
    energy = _energy([(each.norm**2, each.energy(rank)) for each in kept.values()])
    worst = min(kept, key=lambda path: kept[path].energy(rank))
    source = {"path": name, "rank": before, "energy_kept": energy}
    _write(folder, truncated(pairs, rank), [file], recipe, {"resized": source})
    say(
        f"rank {before} -> {rank}: {1 - energy:.3%} of the energy is lost, "
        f"at most {1 - kept[worst].energy(rank):.3%} of a layer's ({worst})"
    )
    return {
        "path": str(folder), "rank": rank, "rank_before": before, "energy_kept": energy,
        "layers": [{"name": path, "energy_kept": each.energy(rank)} for path, each in kept.items()],
    }  # fmt: skip


def combine(out: str, parts: Sequence[Part], rank: int | None, say: Say = lambda line: None) -> dict[str, Any]:
    """Write the weighted sum of several adapters: exactly, their ranks added, or its best approximation of `rank`.

    AdapterError if they belong to different bases; InputError if OUT is there already.
    """
    read = [read_adapter(part.path) for part in parts]
    files, folder = [file for file, _ in read], free_folder(out)
    origin = _common_base(parts, files, say)
    whole = concatenated([folded(file, part.weight) for file, part in zip(files, parts, strict=True)])
    exact = largest_rank(whole)
    if exact > MAX_RANK or (rank is not None and rank < 1):
        raise InputError(f"--rank: found {rank}, allowed: 1 to {exact}, the ranks of all adapters together.")
    shortened = rank is not None and rank < exact
    energy = 1.0
    if shortened:
        assert rank is not None
        spectra = [spectrum(a, b, 1.0) for a, b in whole.values()]
        energy = _energy([(each.norm**2, each.energy(rank)) for each in spectra])
    made = truncated(whole, rank) if shortened and rank is not None else padded(whole, exact)
    sources = {"parts": [{"name": part.name, "path": part.path, "weight": part.weight} for part in parts]}
    _write(folder, made, [origin, *files], _common_recipe(parts, [recipe for _, recipe in read], say), sources)
    lost = f"{1 - energy:.3%} of the energy is lost" if shortened else "exactly, by concatenation"
    say(f"{' + '.join(f'{part.weight:g} {part.name}' for part in parts)} in rank {largest_rank(made)}, {lost}")
    return {"path": str(folder), "rank": largest_rank(made), "energy_kept": energy, "exact": not shortened, **sources}


def free_folder(out: str) -> Path:
    """OUT as a folder that nothing is in yet. InputError if there is something."""
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is there already. Name a folder that does not exist yet.")
    return folder


def _energy(layers: Sequence[tuple[float, float]]) -> float:
    """The share of the whole adapter's energy, from each layer's energy and the share of it that is kept."""
    whole = sum(energy for energy, _ in layers)
    return sum(energy * kept for energy, kept in layers) / whole if whole else 1.0


def _common_base(parts: Sequence[Part], files: Sequence[AdapterFile], say: Say) -> AdapterFile:
    """An adapter that knows the base of all of them. AdapterError if they were trained on different ones."""
    known = [(part, file) for part, file in zip(parts, files, strict=True) if file.base_sha256]
    for part, file in known:
        if file.base_sha256 != known[0][1].base_sha256:
            raise AdapterError(
                f"{part.name} ({part.path}) was trained on other weights than {known[0][0].name}: base "
                f"{file.config.get('base_model_name_or_path')!r}, sha256 {str(file.base_sha256)[:12]}..., against "
                f"{str(known[0][1].base_sha256)[:12]}.... Adapters add up only on one base."
            )
    for part, file in zip(parts, files, strict=True):
        if not file.base_sha256:
            say(f"{part.name} carries no fingerprint of its base: that it belongs to this one can't be checked.")
    _refuse_other_shapes(parts, files)
    return known[0][1] if known else files[0]


def _refuse_other_shapes(parts: Sequence[Part], files: Sequence[AdapterFile]) -> None:
    shapes: dict[str, tuple[str, list[int]]] = {}
    for part, file in zip(parts, files, strict=True):
        for path, (a, b) in file.pairs.items():
            shape = [b.shape[0], a.shape[1]]
            name, known = shapes.setdefault(path, (part.name, shape))
            if known != shape:
                raise AdapterError(
                    f"{path} is {shape} in {part.name}, but {known} in {name}. Adapters add up only on one base."
                )


def _common_recipe(parts: Sequence[Part], recipes: Sequence[Recipe | None], say: Say) -> Recipe | None:
    """The recipe that says how the base is stored, if all agree on it."""
    first = recipes[0]
    for part, recipe in zip(parts, recipes, strict=True):
        if recipe is None or first is None:
            say(f"{part.name if recipe is None else parts[0].name} has no recipe: none is written for the sum")
            return None
        if (recipe.quant, recipe.model.dtype) != (first.quant, first.model.dtype):
            say(f"{part.name} was trained on a base stored otherwise than that of {parts[0].name}, which is used here")
    return first


def _write(
    folder: Path, pairs: Pairs, files: Sequence[AdapterFile], recipe: Recipe | None, made: Mapping[str, Any]
) -> None:
    """The folder: adapter, tokenizer files of the first source, recipe, manifest and card."""
    origin, rank = files[0], largest_rank(pairs)
    with folder_in_one_step(folder) as aside:
        write_plain(aside, pairs, origin, targets_of(files))
        for file in tokenizer_files(origin.folder):
            write_bytes(aside / file.name, file.read_bytes())
        files_written = manifest_of(aside)
        if recipe:
            adapter = recipe.adapter.model_copy(update=PLAIN | {"rank": rank, "alpha": float(rank)})
            write_text(aside / RECIPE, dump(recipe.model_copy(update={"adapter": adapter})))
        base = {
            "name": origin.config.get("base_model_name_or_path"),
            "revision": origin.config.get("revision"),
            "sha256": origin.base_sha256,
        }
        manifest = {
            "qlora": __version__, "created": datetime.now(UTC).isoformat(timespec="seconds"), "base": base,
            "adapter": {"kind": "lora", "rank": rank, "alpha": rank, "paths": list(pairs)}, **made,
            "files": files_written,
        }  # fmt: skip
        write_json(aside / MANIFEST, manifest)
        write_text(aside / CARD, reworked_card(manifest))
