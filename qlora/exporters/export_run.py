"""`qlora export`: write an export atomically, measure the written files against the trained model, describe it."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from qlora.adapters.peft_files import AdapterFile
from qlora.adapters.trainable_tokens import token_rows
from qlora.exporters import FULL_MODELS, TARGETS, WHOLE_MODELS, ExportRequest
from qlora.exporters.adapter_servers import ServedBase
from qlora.exporters.export_source import ExportOptions, ExportSource
from qlora.exporters.gguf import DEFAULT_STORAGE
from qlora.exporters.gguf.llama_cpp_checkout import CheckoutExporter
from qlora.exporters.measure import measure
from qlora.exporters.model_servers import servers
from qlora.exporters.served_files import ServedFiles
from qlora.exporters.served_template import served_templates
from qlora.exporters.server_support import as_text
from qlora.model.dtypes import DTYPES, dtype_name, stored_dtype
from qlora.model.safetensors_writer import PROGRESS
from qlora.quant import build_quantizer
from qlora.recipe.recipe import dump
from qlora.runs.artifacts import MODEL_CARD, read_manifest
from qlora.runs.base_loading import loading_of
from qlora.runs.load_run import LoadedRun
from qlora.runs.memory_setup import Log
from qlora.runs.report.export_model_card import export_model_card
from qlora.runs.report.model_card import base_warning, is_hub_name
from qlora.utils.atomic_files import sha256_of, write_text
from qlora.utils.atomic_folders import atomic_folder
from qlora.utils.progress import ProgressReporter


def export_run(run: LoadedRun, request: ExportRequest, out: str, log: Log = lambda line: None) -> dict[str, Any]:
    """Write an export and its certificate; returns the answer of `qlora export`.

    InputError if options contradict each other, or the folder exists; QloraError if the certificate is above a limit:
    then there is no folder, but the same request with another limit reuses what was written.
    """
    folder = Path(out)
    request.check(folder)
    request.check_source(run.adapter is not None, run.recipe.adapter.kind)
    exporter, dtype = _exporter(request), _dtype(request, run)
    for option in request.unused:
        log(f"careful: {option} has no effect for --to {request.to}, which writes the adapter's float32 matrices")
    progress = ProgressReporter(log, "writing the model", "bytes")
    storage = (request.dtype or DEFAULT_STORAGE) if request.to == "gguf" else ""
    name = run.recipe.model.name
    source = build_source(run)
    options = ExportOptions(request.base, dtype, progress, rank=request.rank, storage=storage, model_name=name)
    with atomic_folder(folder, _resume_key(run, request, dtype)) as partial:
        size = exporter.write(source, partial, options)
        measured = measure(run, partial, request, options, log)
        table = servers(request.to, partial, out, _served_base(run, name))
        stored = storage or dtype_name(dtype if request.to in WHOLE_MODELS else torch.float32)
        facts = {"to": request.to, "base": request.base, "dtype": stored, **measured}
        write_text(partial / MODEL_CARD, _model_card(run, partial, facts))
        (partial / PROGRESS).unlink(missing_ok=True)
    for line in (*options.lines, f"programs that load {out}:\n{as_text(table)}", *_notes(run, request)):
        log(line)
    return {
        "path": str(folder), "base": request.base, "dtype": stored, "bytes": size,
        "agreement": measured.get("agreement"), "rounding": measured.get("rounding"),
        "shortened": measured.get("shortened"), "served": measured.get("served"),
        "conversations": measured.get("conversations"), "findings": measured.get("findings", []),
        "servers": [asdict(server) for server in table],
    }  # fmt: skip


def _notes(run: LoadedRun, request: ExportRequest) -> Iterator[str]:
    """What a user should know who serves it."""
    if run.recipe.data.template_args:
        arguments = json.dumps(dict(run.recipe.data.template_args))
        yield f"its chat template has data.template_args {arguments} where a server passes no other values"
    if request.to not in WHOLE_MODELS:
        yield "these servers add the adapter to the 16-bit base; `--to merged` keeps the quantized one of training"
        yield from (f"careful: {line}" for line in base_warning(_manifest(run)))


def _exporter(request: ExportRequest) -> Any:
    """The target's exporter, or llama.cpp's own programs."""
    return CheckoutExporter(Path(request.llama_cpp)) if request.llama_cpp else TARGETS[request.to]()


def build_source(run: LoadedRun) -> ExportSource:
    """The run as exporters read it; for full fine-tuning its own folder, with an empty adapter."""
    base, extended = run.base, run.base.tokenizer if run.recipe.adapter.new_tokens else None
    folders = (run.tokenizer_folder or base.folder.path, base.folder.path)
    templates = served_templates(run.encoder, base.tokenizer)
    return ExportSource(
        run.adapter or AdapterFile(base.folder.path, {}, {}, None),
        base.folder.path,
        build_quantizer(run.recipe.quant),
        base.manifest.quantized,
        stored_dtype(base.dtype),
        base.device,
        base.model,
        extended,
        {path: (module.index.cpu(), module.rows.detach().cpu()) for path, module in token_rows(base.model).items()},
        run.encoder.template,
        tuple(base.tokenizer.convert_ids_to_tokens(list(base.stop_token_ids))),
        base.stop_token_ids,
        ServedFiles(*folders, extended, templates, base.stop_token_ids),
    )


def _model_card(run: LoadedRun, folder: Path, facts: dict[str, Any]) -> str:
    """The export's README, without local paths."""
    name = run.recipe.model.name
    base = _served_base(run, name if is_hub_name(name) else "BASE")
    table = servers(facts["to"], folder, "THIS_FOLDER", base)
    return export_model_card(_manifest(run), dump(run.recipe), facts, as_text(table), base.loading)


def _served_base(run: LoadedRun, name: str) -> ServedBase:
    return ServedBase(name, run.base.folder.path, loading_of(run.base))


def _manifest(run: LoadedRun) -> dict[str, Any]:
    """The run's manifest; empty for a checkpoint or an adapter of PEFT's, which have none."""
    return read_manifest(run.adapter.folder if run.adapter else run.base.folder.path) or {}


def _resume_key(run: LoadedRun, request: ExportRequest, dtype: torch.dtype) -> str | None:
    """Identifies a partly written model: the same request on the same weights continues it."""
    if request.to not in FULL_MODELS or run.adapter is None:
        return None
    files = sorted(path for path in run.adapter.folder.glob("adapter_*") if path.is_file())
    lines = [request.to, request.base, dtype_name(dtype), run.base.manifest.sha256, *(sha256_of(f) for f in files)]
    lines += [json.dumps(run.recipe.quant.model_dump(mode="json"), sort_keys=True), dtype_name(run.base.dtype)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _dtype(request: ExportRequest, run: LoadedRun) -> torch.dtype:
    """The dtype that base plus update is rounded to: that of the request, else of the run; for GGUF float16."""
    if request.dtype is None:
        return torch.float16 if request.to == "gguf" else run.base.dtype
    return DTYPES.get(request.dtype, torch.float32)  # blocks of a GGUF file are made from float32
