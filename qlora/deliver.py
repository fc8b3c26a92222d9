"""A run out of the house: an export written in one step, and its certificate measured on the written files."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qlora.base import Model
from qlora.base.dtypes import DTYPES, name_of
from qlora.base.load import load
from qlora.errors import InputError, did_you_mean
from qlora.export import TARGETS
from qlora.export.certificate import Agreement, compare
from qlora.export.trained import Choice, Trained
from qlora.files import write_json
from qlora.folders import folder_in_one_step
from qlora.quant import build as build_quantizer
from qlora.quant.dense import Dense
from qlora.reopen import Opened, Say, held_out

ONTO = ("dequantized", "original")
CERTIFICATE_ROWS = 128  # held-out rows of a certificate, if the user does not say


@dataclass(frozen=True)
class Order:
    """What `qlora export` was asked for."""

    to: str
    onto: str
    dtype: str | None
    data: str | None
    rows: int | None


def export_run(opened: Opened, order: Order, out: str, say: Say = lambda line: None) -> dict[str, Any]:
    """Write an export and its certificate; returns what `qlora export` answers.

    InputError if the order can't be meant, or the folder is there already; nothing half-written is left.
    """
    if opened.adapter is None:
        raise InputError("export: this is a model without an adapter; there is nothing to export. Name a run's folder.")
    target, dtype, folder = TARGETS[order.to](), _dtype(order, opened), Path(out)
    if order.onto not in ONTO:
        raise InputError(f"--base: no {order.onto!r}.{did_you_mean(order.onto, ONTO)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is there already. Name a folder that does not exist yet.")
    base = opened.base
    trained = Trained(
        opened.adapter,
        base.folder.path,
        build_quantizer(opened.recipe.quant),
        base.manifest.quantized,
        base.dtype,
        base.device,
    )
    with folder_in_one_step(folder) as aside:
        size = target.write(trained, aside, Choice(order.onto, dtype))
        agreement = certify(opened, aside, order) if order.to == "merged" and order.rows != 0 else None
        if agreement:
            write_json(aside / "certificate.json", asdict(agreement) | {"base": order.onto, "dtype": name_of(dtype)})
            say(f"certificate: {agreement}")
    measured = asdict(agreement) if agreement else None
    return {
        "path": str(folder), "base": order.onto, "dtype": name_of(dtype), "bytes": size, "agreement": measured,
    }  # fmt: skip


def certify(opened: Opened, folder: Path, order: Order) -> Agreement:
    """Load the written model and compare it with the trained one, row by row."""
    examples = held_out(opened, order.data)[: order.rows or CERTIFICATE_ROWS]
    dtype = name_of(_dtype(order, opened))
    written = load(Model.model_validate({"name": str(folder), "dtype": dtype}), Dense(), opened.base.device)
    return compare(opened.base.model, written.model, examples, opened.base.device)


def _dtype(order: Order, opened: Opened) -> torch.dtype:
    """The dtype of a merged model: what the run computed in, unless the user says."""
    if order.dtype is None:
        return opened.base.dtype
    if order.dtype not in DTYPES:
        raise InputError(f"--dtype: no {order.dtype!r}.{did_you_mean(order.dtype, DTYPES)}")
    return DTYPES[order.dtype]
