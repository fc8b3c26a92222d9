"""What `qlora inspect` answers: the spectrum of each adapted matrix, what it suggests, and its curve over ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora.adapters.spectrum import Spectrum, advise, spectrum
from qlora.adapters.peft_files import AdapterFile, settings
from qlora.model.download import ModelFolder, find_here
from qlora.model.original_weights import matrices
from qlora.errors import BaseModelError, InputError
from qlora.utils.atomic_files import write_text
from qlora.recipe.recipe import Recipe
from qlora.runs.load_run import Say, read_adapter
from qlora.runs.report.heat import Layer, heat_page

CURVE = tuple(2**power for power in range(14))  # ranks of the curve
SAMPLES = 8  # matrices of the base that the curve decomposes: one costs seconds to a minute at full size


@dataclass(frozen=True)
class Examined:
    """An adapter's spectra by module path, and its base's folder if that is on this machine."""

    file: AdapterFile
    spectra: Mapping[str, Spectrum]
    base: ModelFolder | None


def examine(name: str) -> Examined:
    """The spectra of a run's, a checkpoint's or an adapter folder's layers, in the order of its file."""
    file, recipe = read_adapter(name)
    spectra = {
        path: spectrum(a, b, settings(file, path, a.shape[0]).scaling)
        for path, (a, b) in sorted(file.pairs.items(), key=lambda pair: _natural(pair[0]))
    }
    return Examined(file, spectra, _base_of(file, recipe))


def inspect_adapter(name: str, curve: bool, picture: str | None, say: Say = lambda line: None) -> dict[str, Any]:
    """What `qlora inspect --json` answers; with `picture`, an SVG page is written there."""
    examined = examine(name)
    advice = advise(list(examined.spectra.values()))
    norms = base_norms(examined, say)
    found: dict[str, Any] = {
        "adapter": str(examined.file.folder),
        "layers": [_layer(path, each, norms.get(path)) for path, each in examined.spectra.items()],
        "suggested_rank": advice.suggested_rank,
        "verdict": advice.verdict,
        "reason": advice.reason,
    }
    if curve:
        found["rank_curve"] = rank_curve(examined, say)
    if picture:
        _draw(Path(picture), examined, found)
    return found


def base_norms(examined: Examined, say: Say) -> dict[str, float]:
    """|W| of each adapted matrix, by path; empty, and said, where the base is not here or is another one."""
    if examined.base is None:
        say("the base is not on this machine: |delta| / |W| is left out")
        return {}
    try:
        found = _norms(examined)
    except BaseModelError as error:
        say(f"|delta| / |W| is left out: {error}")
        return {}
    missing = examined.spectra.keys() - found.keys()
    if missing:
        say(f"|delta| / |W| is left out for {len(missing)} layers that {examined.base.path} has not in this shape")
    return found


def _norms(examined: Examined) -> dict[str, float]:
    assert examined.base is not None
    pairs = examined.file.pairs
    return {
        path: float(torch.linalg.vector_norm(weight, dtype=torch.float64))
        for path, weight in matrices(examined.base.path, set(pairs))
        if tuple(weight.shape) == (pairs[path][1].shape[0], pairs[path][0].shape[1])
    }


def rank_curve(examined: Examined, say: Say = lambda line: None) -> dict[str, Any]:
    """How the error of the best approximation falls with the rank: the updates, and beside them the base's matrices."""
    largest = max(each.rank for each in examined.spectra.values())
    ranks = [rank for rank in CURVE if rank < largest] + [largest]
    return {
        "ranks": ranks,
        "updates": [
            {"name": path, "error": [each.error(rank) for rank in ranks]} for path, each in examined.spectra.items()
        ],
        "base": _base_curves(examined, say),
    }


def _base_curves(examined: Examined, say: Say) -> list[dict[str, Any]] | None:
    if examined.base is None:
        return None
    wanted = _sample(list(examined.spectra))
    curves = []
    try:
        for path, weight in matrices(examined.base.path, set(wanted)):
            say(f"decomposing {path} {list(weight.shape)}")
            values = Spectrum(tuple(torch.linalg.svdvals(weight).double().tolist()))
            ranks = [rank for rank in CURVE if rank < values.rank] + [values.rank]
            curves.append({"name": path, "ranks": ranks, "error": [values.error(rank) for rank in ranks]})
    except BaseModelError as error:
        say(f"the base's own curve is left out: {error}")
        return None
    return sorted(curves, key=lambda curve: wanted.index(curve["name"]))


def _sample(paths: Sequence[str]) -> list[str]:
    """One matrix of each kind (q_proj, up_proj ...), out of the middle of the model."""
    kinds: dict[str, list[str]] = {}
    for path in paths:
        kinds.setdefault(path.rpartition(".")[2], []).append(path)
    return [alike[len(alike) // 2] for alike in kinds.values()][:SAMPLES]


def table(found: Mapping[str, Any]) -> str:
    """The answer for people: a line a layer, and the verdict."""
    layers = found["layers"]
    width = max(len(layer["name"]) for layer in layers)
    lines = [f"{'layer':{width}}  rank  stable  90 %  99 %  dead  |delta|/|W|"]
    for layer in layers:
        ratio = layer["delta_norm_ratio"]
        lines.append(
            f"{layer['name']:{width}}  {layer['rank']:4}  {layer['stable_rank']:6.2f}  {layer['energy_90_rank']:4}  "
            f"{layer['energy_99_rank']:4}  {layer['dead_directions']:4}  {'?' if ratio is None else f'{ratio:.4f}':>11}"
        )
    lines += [*_curve_lines(found.get("rank_curve")), _verdict(found)]
    return "\n".join(lines)


def _curve_lines(curve: Mapping[str, Any] | None) -> list[str]:
    if curve is None:
        return []
    lines = ["", "what is lost at a rank: |D - D_r| / |D|, the mean over the updates"]
    for place, rank in enumerate(curve["ranks"]):
        errors = [update["error"][place] for update in curve["updates"]]
        lines.append(f"  {rank:5}  {sum(errors) / len(errors):7.2%}")
    for matrix in curve["base"] or []:
        shown = ", ".join(f"{rank}: {error:.0%}" for rank, error in zip(matrix["ranks"], matrix["error"], strict=True))
        lines.append(f"the base's {matrix['name']} itself: {shown}")
    return [*lines, ""]


def _verdict(found: Mapping[str, Any]) -> str:
    suggested, ranks = found["suggested_rank"], {layer["rank"] for layer in found["layers"]}
    ending = {
        "too high": f"try adapter.rank={suggested}, or `qlora resize {found['adapter']} OUT --rank {suggested}`",
        "saturated": f"try adapter.rank={suggested}",
        "fits": f"rank {suggested} is right",
        "untrained": "nothing was learnt",
    }
    return f"rank {max(ranks)}: {found['verdict']} ({found['reason']}); {ending[found['verdict']]}"


def _layer(path: str, found: Spectrum, base_norm: float | None) -> dict[str, Any]:
    return {
        "name": path,
        "rank": found.rank,
        "stable_rank": found.stable_rank,
        "energy_90_rank": found.energy_rank(0.90),
        "energy_99_rank": found.energy_rank(0.99),
        "dead_directions": found.dead,
        "delta_norm": found.norm,
        "delta_norm_ratio": found.norm / base_norm if base_norm else None,
        "singular_values": list(found.values),
    }


def _draw(path: Path, examined: Examined, found: Mapping[str, Any]) -> None:
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(
            f"--picture: {path} can't be written. Name a file such as spectrum.svg in a folder that exists."
        )
    layers = [Layer(name, each.values, each.energy_rank(0.90)) for name, each in examined.spectra.items()]
    write_text(path, heat_page(examined.file.folder.name, layers, _verdict(found)))


def _base_of(file: AdapterFile, recipe: Recipe | None) -> ModelFolder | None:
    if recipe:
        return find_here(recipe.model.name, recipe.model.revision)
    name, revision = (file.config.get(key) for key in ("base_model_name_or_path", "revision"))
    return find_here(name, revision) if isinstance(name, str) and name else None


def _natural(path: str) -> list[tuple[int, int, str]]:
    """Layer 2 before layer 10; the matrices of a layer keep their order by name."""
    return [(0, int(step), "") if step.isdigit() else (1, 0, step) for step in path.split(".")]
