"""Export target `mlx`: the adapter as mlx-lm reads it, LoRA and DoRA, with one rank and a scale of 1.

    adapters.safetensors   {path}.lora_a [I, R] = A^T,  {path}.lora_b [R, O] = s B^T,  {path}.m [O] of DoRA
    adapter_config.json    fine_tune_type, num_layers, lora_parameters {rank, scale, dropout, keys}

Ranks by module are padded with zeros and the scaling is in B: the updates stay exact. A merged folder is what mlx-lm
reads as a model. Source: mlx-lm 0.32.2, `tuner/utils.py` (`load_adapters`), `tuner/lora.py`, `tuner/dora.py`.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qlora.adapters.peft_config import module_settings
from qlora.adapters.peft_files import CONFIG, AdapterFile, read_tensors, refuse_non_finite, serialize
from qlora.adapters.plain_lora import Pairs, largest_rank, pad, refuse_base_weights, refuse_changed_base
from qlora.errors import AdapterError, InputError
from qlora.exporters.export_source import ExportOptions, ExportSource
from qlora.exporters.server_support import mlx_problem
from qlora.model.meta_model import read_config
from qlora.model.module_tree import decoder_of, path_of, unit_path
from qlora.utils.atomic_files import read_json, write_bytes, write_json

WEIGHTS = "adapters.safetensors"
A_END, B_END, M_END = ".lora_a", ".lora_b", ".m"
WRAPPED = "language_model"  # mlx-lm's name of the text model of a wrapper checkpoint


class MlxExporter:
    """Writes mlx-lm's adapter files."""

    def write(self, source: ExportSource, folder: Path, options: ExportOptions) -> int:
        """Write the adapter's two files and the tokenizer; returns the bytes of the tensors' file.

        InputError for a model that mlx-lm computes otherwise; AdapterError for weights that are no update of a matrix.
        """
        problem = mlx_problem(read_json(source.base_folder / "config.json"))
        if problem:
            raise InputError(f"--to mlx: mlx-lm {problem}. Nothing was written.")
        pairs = _pairs(source)
        tensors = _tensors(source, pairs)
        refuse_non_finite(tensors, folder / WEIGHTS)
        write_bytes(folder / WEIGHTS, serialize(tensors))
        write_json(folder / CONFIG, _config(source, pairs))
        source.write_tokenizer(folder)
        return (folder / WEIGHTS).stat().st_size


def read_mlx(folder: Path) -> AdapterFile:
    """The adapter that `MlxExporter` wrote, under mlx-lm's names, as one of PEFT's format."""
    named, settings = read_tensors(folder / WEIGHTS), read_json(folder / CONFIG)
    paths = [key.removesuffix(A_END) for key in named if key.endswith(A_END)]
    pairs = {path: (named[path + A_END].t(), named[path + B_END].t()) for path in paths}
    magnitudes = {path: named[path + M_END] for path in paths if path + M_END in named}
    parameters = settings["lora_parameters"]
    rank, alpha = parameters["rank"], parameters["rank"] * parameters["scale"]
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": paths,
        "use_dora": bool(magnitudes),
    }
    return AdapterFile(folder, config, pairs, None, magnitudes)


def _pairs(source: ExportSource) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of every adapted matrix by path in the trained class, the scaling in B, all of the largest rank."""
    file = source.adapter
    refuse_changed_base(file)
    refuse_base_weights(file)
    experts = next((path for path in file.pairs if path.rpartition(".")[2].isdecimal()), None)
    if experts or file.config.get("target_parameters"):
        raise AdapterError(
            f"--to mlx: {file.folder} has updates of experts ({experts or file.config['target_parameters'][0]}), which "
            "mlx-lm names by family. Use --to merged: mlx-lm reads its folder."
        )
    scaled = {
        path: (a.float(), b.float() * module_settings(file.config, path, a.shape[0]).scaling)
        for path, (a, b) in file.pairs.items()
    }
    return pad(scaled, largest_rank(scaled))


def _tensors(source: ExportSource, pairs: Pairs) -> dict[str, Tensor]:
    """The tensors under the names of mlx-lm's class."""
    names = _names(source.model, pairs, source.base_folder)
    tensors = {f"{names[path]}{A_END}": a.t().contiguous() for path, (a, _) in pairs.items()}
    tensors |= {f"{names[path]}{B_END}": b.t().contiguous() for path, (_, b) in pairs.items()}
    return tensors | {f"{names[path]}{M_END}": m.float() for path, m in source.adapter.magnitudes.items()}


def _names(model: nn.Module, paths: Iterable[str], base_folder: Path) -> dict[str, str]:
    """Path in the trained class -> path in mlx-lm's: `model.layers`, below the name of the text model in wrappers."""
    config = read_config(base_folder)
    if config.get_text_config() is config:
        return {path: path for path in paths}
    decoder = path_of(model, decoder_of(model))
    inner = {path: f"model{path.removeprefix(decoder)}" if path.startswith(decoder) else path for path in paths}
    return {path: f"{WRAPPED}.{name}" for path, name in inner.items()}


def _config(source: ExportSource, pairs: Pairs) -> dict[str, Any]:
    names = _names(source.model, pairs, source.base_folder)
    layers = read_config(source.base_folder).get_text_config().num_hidden_layers
    return {
        "fine_tune_type": "dora" if source.adapter.magnitudes else "lora",
        "num_layers": layers,
        "lora_parameters": {
            "rank": largest_rank(pairs), "scale": 1.0, "dropout": 0.0, "keys": _keys([*names.values()], layers),
        },
    }  # fmt: skip


def _keys(names: list[str], layers: int) -> list[str]:
    """Names inside a decoder layer, if every layer has the same; else full paths, which mlx-lm also looks up."""
    units: dict[str, set[str]] = {}
    for name in names:
        units.setdefault(unit_path(name), set()).add(name.removeprefix(f"{unit_path(name)}."))
    (first, *others) = units.values()
    same = len(units) == layers and all(inner == first for inner in others)
    return sorted(first if same else names)
