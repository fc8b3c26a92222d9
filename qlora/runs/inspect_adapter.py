"""`qlora inspect`: the spectrum of each adapted matrix, the rank that it suggests, and the error at lower ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora.adapters.peft_files import AdapterFile
from qlora.adapters.plain_lora import refuse_changed_base
from qlora.adapters.spectrum import Spectrum, advise
from qlora.adapters.update_spectra import by_stack, update_spectra
from qlora.errors import BaseModelError
from qlora.model.download import find_local
from qlora.model.model_folder import ModelFolder
from qlora.model.original_weights import iter_weights
from qlora.recipe.recipe import Recipe
from qlora.runs.load_run import read_adapter
from qlora.runs.memory_setup import Log
from qlora.runs.report.spectrum_page import UpdateSpectrum, spectrum_svg
from qlora.utils.atomic_files import write_text

CURVE = tuple(2**power for power in range(14))  # ranks of the curve
SAMPLES = 8  # matrices of the base model in the curve: the SVD of one takes seconds to a minute at full size


@dataclass(frozen=True)
class AdapterSpectra:
    """The spectra of an adapter by module path, and the base model's folder if it is on this machine."""

    file: AdapterFile
    spectra: Mapping[str, Spectrum]
    base: ModelFolder | None


def read_spectra(name: str, log: Log = lambda line: None) -> AdapterSpectra:
    """The spectra of a run, a checkpoint or an adapter folder, layers in ascending order."""
    file, recipe = read_adapter(name, log)
    refuse_changed_base(file)
    spectra = dict(sorted(update_spectra(file).items(), key=lambda item: _natural_order(item[0])))
    return AdapterSpectra(file, spectra, _find_base(file, recipe))


def inspect_adapter(name: str, curve: bool, picture: str | None, log: Log = lambda line: None) -> dict[str, Any]:
    """The object of `qlora inspect --json`; with `picture`, an SVG file is written there."""
    adapter = read_spectra(name, log)
    advice = advise([adapter.spectra[path] for path in judged_paths(adapter)])
    norms = base_norms(adapter, log)
    result: dict[str, Any] = {
        "adapter": str(adapter.file.folder),
        "layers": [_layer(path, values, norms.get(path)) for path, values in adapter.spectra.items()],
        "suggested_rank": advice.suggested_rank,
        "verdict": advice.verdict,
        "reason": advice.reason,
    }
    if curve:
        result["rank_curve"] = rank_curve(adapter, log)
    if picture:
        _write_picture(Path(picture), adapter, result)
    return result


def judged_paths(adapter: AdapterSpectra) -> list[str]:
    """The updates that the rank is judged by: without experts, which have a rank of their own, if there are others."""
    stacks = {path for path, members in by_stack(adapter.file).items() if path not in members}
    return [path for path in adapter.spectra if path not in stacks] or [*adapter.spectra]


def base_norms(adapter: AdapterSpectra, log: Log) -> dict[str, float]:
    """|W| of each adapted matrix, or the mean of a stack, by path.

    Empty, with a line logged, without the base model or with another one.
    """
    if adapter.base is None:
        log("the base model is not on this machine: |delta| / |W| is left out")
        return {}
    try:
        norms = _norms(adapter, adapter.base)
    except BaseModelError as error:
        log(f"|delta| / |W| is left out: {error}")
        return {}
    missing = adapter.spectra.keys() - norms.keys()
    if missing:
        log(f"|delta| / |W| is left out for {len(missing)} layers: {adapter.base.path} has no matrix of this shape")
    return norms


def _norms(adapter: AdapterSpectra, base: ModelFolder) -> dict[str, float]:
    pairs = adapter.file.pairs
    norms = {
        path: float(torch.linalg.vector_norm(weight, dtype=torch.float64))
        for path, weight in iter_weights(base.path, set(pairs))
        if tuple(weight.shape) == (pairs[path][1].shape[0], pairs[path][0].shape[1])
    }
    groups = by_stack(adapter.file).items()
    return {
        path: (sum(norms[member] ** 2 for member in members) / len(members)) ** 0.5
        for path, members in groups if members.keys() <= norms.keys()
    }  # fmt: skip


def rank_curve(adapter: AdapterSpectra, log: Log = lambda line: None) -> dict[str, Any]:
    """The error of the best approximation by rank, of the updates and of some of the base model's matrices."""
    largest = max(values.rank for values in adapter.spectra.values())
    ranks = [rank for rank in CURVE if rank < largest] + [largest]
    return {
        "ranks": ranks,
        "updates": [
            {"name": path, "error": [values.error(rank) for rank in ranks]} for path, values in adapter.spectra.items()
        ],
        "base": _base_curves(adapter, log),
    }


def _base_curves(adapter: AdapterSpectra, log: Log) -> list[dict[str, Any]] | None:
    if adapter.base is None:
        return None
    paths = [next(iter(by_stack(adapter.file)[path])) for path in _sample(list(adapter.spectra))]
    curves = []
    try:
        for path, weight in iter_weights(adapter.base.path, set(paths)):
            log(f"SVD of {path} {list(weight.shape)}")
            values = Spectrum(tuple(torch.linalg.svdvals(weight).double().tolist()))
            ranks = [rank for rank in CURVE if rank < values.rank] + [values.rank]
            curves.append({"name": path, "ranks": ranks, "error": [values.error(rank) for rank in ranks]})
    except BaseModelError as error:
        log(f"the base model's curve is left out: {error}")
        return None
    return sorted(curves, key=lambda curve: paths.index(curve["name"]))


def _sample(paths: Sequence[str]) -> list[str]:
    """One matrix of each kind (q_proj, up_proj ...), from the middle of the model."""
    kinds: dict[str, list[str]] = {}
    for path in paths:
        kinds.setdefault(path.rpartition(".")[2], []).append(path)
    return [group[len(group) // 2] for group in kinds.values()][:SAMPLES]


def table(result: Mapping[str, Any]) -> str:
    """The result as text: a line for each adapted matrix, and the verdict."""
    layers = result["layers"]
    width = max(len(layer["name"]) for layer in layers)
    lines = [f"{'layer':{width}}  rank  stable  90 %  99 %  dead  |delta|/|W|"]
    for layer in layers:
        ratio = layer["delta_norm_ratio"]
        lines.append(
            f"{layer['name']:{width}}  {layer['rank']:4}  {layer['stable_rank']:6.2f}  {layer['energy_90_rank']:4}  "
            f"{layer['energy_99_rank']:4}  {layer['dead_directions']:4}  {'?' if ratio is None else f'{ratio:.4f}':>11}"
        )
    lines += [*_curve_lines(result.get("rank_curve")), _verdict(result)]
    return "\n".join(lines)


def _curve_lines(curve: Mapping[str, Any] | None) -> list[str]:
    if curve is None:
        return []
    lines = ["", "error of the best approximation of a rank, |D - D_r| / |D|, mean over the updates:"]
    for index, rank in enumerate(curve["ranks"]):
        errors = [update["error"][index] for update in curve["updates"]]
        lines.append(f"  {rank:5}  {sum(errors) / len(errors):7.2%}")
    for matrix in curve["base"] or []:
        pairs = zip(matrix["ranks"], matrix["error"], strict=True)
        lines.append(f"base model, {matrix['name']}: {', '.join(f'{rank}: {error:.0%}' for rank, error in pairs)}")
    return [*lines, ""]


def _verdict(result: Mapping[str, Any]) -> str:
    suggested, ranks = result["suggested_rank"], {layer["rank"] for layer in result["layers"]}
    advice = {
        "too high": f"try adapter.rank={suggested}, or `qlora resize {result['adapter']} OUT --rank {suggested}`",
        "saturated": f"try adapter.rank={suggested}",
        "fits": f"keep rank {suggested}",
        "untrained": "the adapter learned nothing",
    }
    return f"rank {max(ranks)}: {result['verdict']} ({result['reason']}); {advice[result['verdict']]}"


def _layer(path: str, values: Spectrum, base_norm: float | None) -> dict[str, Any]:
    return {
        "name": path,
        "rank": values.rank,
        "stable_rank": values.stable_rank,
        "energy_90_rank": values.energy_rank(0.90),
        "energy_99_rank": values.energy_rank(0.99),
        "dead_directions": values.dead,
        "delta_norm": values.norm,
        "delta_norm_ratio": values.norm / base_norm if base_norm else None,
        "singular_values": list(values.values),
    }


def _write_picture(path: Path, adapter: AdapterSpectra, result: Mapping[str, Any]) -> None:
    updates = [
        UpdateSpectrum(name, values.rank, values.energy_rank(0.90), values.stable_rank, values.norm, values.values)
        for name, values in adapter.spectra.items()
    ]
    write_text(path, spectrum_svg(adapter.file.folder.name, updates, _verdict(result)))


def _find_base(file: AdapterFile, recipe: Recipe | None) -> ModelFolder | None:
    if recipe:
        return find_local(recipe.model.name, recipe.model.revision)
    name, revision = (file.config.get(key) for key in ("base_model_name_or_path", "revision"))
    return find_local(name, revision) if isinstance(name, str) and name else None


def _natural_order(path: str) -> list[tuple[int, int, str]]:
    """A sort key: layer 2 before layer 10; the matrices of a layer in alphabetical order."""
    return [(0, int(step), "") if step.isdigit() else (1, 0, step) for step in path.split(".")]
