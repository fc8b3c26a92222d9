"""A run out of the house: an export written in one step, its certificate measured on the written files, its card."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qlora.adapters.peft_files import AdapterFile
from qlora.adapters.trainable_tokens import row_modules
from qlora.errors import InputError, QloraError, did_you_mean
from qlora.exporters import TARGETS
from qlora.exporters.adapter_agreement import as_lora
from qlora.exporters.certificate import Agreement, Rounding, compare, rounding
from qlora.exporters.export_source import ExportOptions, ExportSource
from qlora.exporters.portable import Shortened, shortened
from qlora.exporters.server_support import as_text, servers
from qlora.memory.weight_streaming import embed_on_host
from qlora.model.dtypes import DTYPES, name_of
from qlora.model.lazy_model import model_in_files
from qlora.model.safetensors_writer import PROGRESS
from qlora.quant import build as build_quantizer
from qlora.recipe.recipe import dump
from qlora.runs.artifacts import CARD, MANIFEST
from qlora.runs.full_model import ADAPTERLESS
from qlora.runs.load_run import LoadedRun, Say, has_rows, held_out
from qlora.runs.report.export_card import exported_card
from qlora.runs.report.model_card import caution, is_hub
from qlora.utils.atomic_files import sha256_of, write_json, write_text
from qlora.utils.atomic_folders import folder_in_one_step
from qlora.utils.progress import ProgressReporter

ONTO = ("dequantized", "original")
MODELS = ("merged", "ollama")  # targets that are whole models, and so have a certificate
CERTIFICATE_ROWS = 128  # held-out rows of a certificate, if the user does not say
MAX_KL = 0.05  # nats a token on the base that was trained on, if the user does not say; onto another base no limit
MAX_LOST = 1.0  # rounding error over the update: beyond it rounding moved the weights further than training did


@dataclass(frozen=True)
class ExportRequest:
    """What `qlora export` was asked for."""

    to: str
    onto: str
    dtype: str | None
    data: str | None
    rows: int | None
    max_kl: float | None = None
    max_lost: float = MAX_LOST
    rank: int | None = None


def export_run(opened: LoadedRun, order: ExportRequest, out: str, say: Say = lambda line: None) -> dict[str, Any]:
    """Write an export and its certificate; returns what `qlora export` answers.

    InputError if the order can't be meant, or the folder is there already; QloraError if the certificate is above a
    limit: then there is no folder, and what was written waits aside for the same order with another limit.
    """
    _refuse_adapterless(opened, order)
    target, dtype, folder = TARGETS[order.to](), _dtype(order, opened), Path(out)
    if order.onto not in ONTO:
        raise InputError(f"--base: no {order.onto!r}.{did_you_mean(order.onto, ONTO)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is there already. Name a folder that does not exist yet.")
    if order.rank is not None and (order.to != "portable" or order.rank < 1):
        raise InputError(f"--rank: found {order.rank} for --to {order.to}, allowed: from 1, for --to portable.")
    choice = ExportOptions(order.onto, dtype, ProgressReporter(say, "writing the model", "bytes"), rank=order.rank)
    trained = trained_of(opened)
    with folder_in_one_step(folder, _key(opened, order, dtype)) as aside:
        size = target.write(trained, aside, choice)
        measured = _certified(opened, aside, order, choice, say)
        table = servers(order.to, aside, out, opened.recipe.model.name)
        facts = {"to": order.to, "base": order.onto, "dtype": name_of(dtype), **measured}
        if order.to != "adapter":
            write_text(aside / CARD, _card(opened, aside, facts))
        (aside / PROGRESS).unlink(missing_ok=True)
    say(f"who takes {out} as it is:\n{as_text(table)}")
    if order.to not in MODELS:
        say("these servers add the adapter to the 16-bit base; `--to merged` keeps the quantised one it was trained on")
        for line in caution(_run_manifest(_source(opened))):
            say(f"careful: {line}")
    return {
        "path": str(folder), "base": order.onto, "dtype": name_of(dtype), "bytes": size,
        "agreement": measured.get("agreement"), "rounding": measured.get("rounding"),
        "shortened": measured.get("shortened"),
        "servers": [asdict(row) for row in table],
    }  # fmt: skip


def _refuse_adapterless(opened: LoadedRun, order: ExportRequest) -> None:
    if opened.adapter is not None:
        return
    if opened.recipe.adapter.kind != "full":
        raise InputError("export: this is a model without an adapter; there is nothing to export. Name a run's folder.")
    if order.to in TARGETS and order.to not in MODELS:
        raise InputError(f"--to {order.to}: {ADAPTERLESS} Use --to merged or --to ollama.")


def trained_of(opened: LoadedRun) -> ExportSource:
    """The run as the export targets see it; where every weight trained, its own folder with nothing to add."""
    base = opened.base
    return ExportSource(
        opened.adapter or AdapterFile(base.folder.path, {}, {}, None),
        base.folder.path,
        build_quantizer(opened.recipe.quant),
        base.manifest.quantized,
        base.dtype,
        base.device,
        base.model,
        base.tokenizer if opened.recipe.adapter.new_tokens else None,
        {path: (each.index.cpu(), each.rows.detach().cpu()) for path, each in row_modules(base.model).items()},
        opened.encoder.template,
        tuple(base.tokenizer.convert_ids_to_tokens(list(base.stops))),
    )


def certify(opened: LoadedRun, folder: Path, order: ExportRequest) -> Agreement:
    """Compare the written model with the trained one; its matrices are read from the files as they are used."""
    examples = held_out(opened, order.data)[: order.rows or CERTIFICATE_ROWS]
    device, attention = opened.base.device, opened.recipe.model.attention
    trained: Any = opened.base.model
    written = model_in_files(folder, _dtype(order, opened), attention, device, beside=trained)
    if trained.get_input_embeddings().weight.device != device:
        embed_on_host(written, device)
    return compare(trained, written, examples, device)


def _certified(
    opened: LoadedRun, folder: Path, order: ExportRequest, choice: ExportOptions, say: Say
) -> dict[str, Any]:
    """Measure what was written, say it, write certificate.json. QloraError above a limit."""
    short = shortened(choice.shortened)
    if short:
        return _certified_as_lora(opened, folder, order, short, say)
    if order.to not in MODELS:
        return {}
    took = rounding(choice.rounding)
    if choice.rounding:
        say(str(took))
    agreement = certify(opened, folder, order) if order.rows != 0 else None
    if agreement:
        say(f"certificate: {agreement}")
        limits = {"max_kl": _max_kl(order), "max_lost": order.max_lost}
        written = {"base": order.onto, "dtype": name_of(choice.dtype), "rounding": asdict(took), "limits": limits}
        write_json(folder / "certificate.json", asdict(agreement) | written)
    _refuse(took, agreement, order)
    return {"agreement": asdict(agreement) if agreement else None, "rounding": asdict(took)}


def _certified_as_lora(
    opened: LoadedRun, folder: Path, order: ExportRequest, short: Shortened, say: Say
) -> dict[str, Any]:
    """Measure the LoRA that stands for DoRA, say it, write certificate.json. QloraError above --max-kl if there is."""
    say(str(short))
    found: dict[str, Any] = {"shortened": asdict(short)}
    if order.rows == 0 or (order.data is None and not has_rows(opened)):
        return found
    agreement = as_lora(opened, folder, held_out(opened, order.data)[: order.rows or CERTIFICATE_ROWS])
    say(f"certificate: {agreement}")
    write_json(folder / "certificate.json", asdict(agreement) | found)
    if order.max_kl is not None and not agreement.mean_kl <= order.max_kl:
        raise QloraError(
            f"export: mean KL {agreement.mean_kl:.2e} is above the limit {order.max_kl:g}; nothing was exported. "
            f"Take a higher --rank, or --max-kl {_above(agreement.mean_kl)} to insist."
        )
    return found | {"agreement": asdict(agreement)}


def _refuse(took: Rounding, agreement: Agreement | None, order: ExportRequest) -> None:
    limit = _max_kl(order)
    if agreement and limit is not None and not agreement.mean_kl <= limit:
        raise QloraError(
            f"export: mean KL {agreement.mean_kl:.2e} is above the limit {limit:g}: the written model is not the "
            "trained one. Nothing was exported. "
            f"Try --dtype float32, or --max-kl {_above(agreement.mean_kl)} to insist."
        )
    if took.lost > order.max_lost:
        raise QloraError(
            f"export: {took}. The limit is {order.max_lost:.0%}; nothing was exported. "
            f"Take --dtype float32 or float16, or --max-lost {_above(took.lost)} to insist."
        )


def _above(value: float) -> str:
    return f"{value * 1.1:.2g}"


def _max_kl(order: ExportRequest) -> float | None:
    """Onto the original weights the quantisation error comes back: it is measured and said, but no mistake."""
    return MAX_KL if order.max_kl is None and order.onto == "dequantized" else order.max_kl


def _card(opened: LoadedRun, folder: Path, facts: dict[str, Any]) -> str:
    """The export's README; the places of this machine stay out of it."""
    name = opened.recipe.model.name
    table = servers(facts["to"], folder, "THIS_FOLDER", name if is_hub(name) else "BASE")
    return exported_card(_run_manifest(_source(opened)), dump(opened.recipe), facts, as_text(table))


def _source(opened: LoadedRun) -> Path:
    """The folder of what was trained."""
    return opened.adapter.folder if opened.adapter else opened.base.folder.path


def _key(opened: LoadedRun, order: ExportRequest, dtype: torch.dtype) -> str | None:
    """What a half-written model is to become: the same order on the same weights goes on with it."""
    if order.to not in MODELS or opened.adapter is None:
        return None
    files = sorted(path for path in opened.adapter.folder.glob("adapter_*") if path.is_file())
    said = [order.to, order.onto, name_of(dtype), opened.base.manifest.sha256, *(sha256_of(file) for file in files)]
    said += [json.dumps(opened.recipe.quant.model_dump(mode="json"), sort_keys=True), name_of(opened.base.dtype)]
    return hashlib.sha256("\n".join(said).encode()).hexdigest()


def _run_manifest(folder: Path) -> dict[str, Any]:
    """The run's manifest; a checkpoint has none of its own yet, an adapter of PEFT's has none at all."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _dtype(order: ExportRequest, opened: LoadedRun) -> torch.dtype:
    """The dtype of a merged model: what the run computed in, unless the user says."""
    if order.dtype is None:
        return opened.base.dtype
    if order.dtype not in DTYPES:
        raise InputError(f"--dtype: no {order.dtype!r}.{did_you_mean(order.dtype, DTYPES)}")
    return DTYPES[order.dtype]
