"""`qlora export`: write an export atomically, measure the written files against the trained model, describe it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from qlora.adapters.peft_files import AdapterFile
from qlora.adapters.trainable_tokens import token_rows
from qlora.errors import QloraError
from qlora.exporters import FULL_MODELS, MAX_KL, MERGE_BASE, TARGETS, ExportRequest
from qlora.exporters.adapter_agreement import compare_adapters
from qlora.exporters.certificate import Agreement, Rounding, compare, summarize_rounding
from qlora.exporters.export_source import ExportOptions, ExportSource, with_default_arguments
from qlora.exporters.portable import LowRankApproximation, summarize_approximation
from qlora.exporters.server_support import as_text, servers
from qlora.memory.weight_streaming import embed_on_host
from qlora.model.dtypes import DTYPES, dtype_name, stored_dtype
from qlora.model.lazy_model import load_lazy_model
from qlora.model.meta_model import read_config
from qlora.model.safetensors_writer import PROGRESS
from qlora.quant import build_quantizer
from qlora.recipe.default_recipe import has_data
from qlora.recipe.recipe import dump
from qlora.runs.artifacts import MODEL_CARD, read_manifest
from qlora.runs.load_run import LoadedRun, held_out_examples
from qlora.runs.memory_setup import Log
from qlora.runs.report.export_model_card import export_model_card
from qlora.runs.report.model_card import base_warning, is_hub_name
from qlora.utils.atomic_files import sha256_of, write_json, write_text
from qlora.utils.atomic_folders import atomic_folder
from qlora.utils.devices import same_device
from qlora.utils.progress import ProgressReporter

CERTIFICATE = "certificate.json"
CERTIFICATE_ROWS = 128  # held-out examples of a certificate, if `--rows` is not given


def export_run(run: LoadedRun, request: ExportRequest, out: str, log: Log = lambda line: None) -> dict[str, Any]:
    """Write an export and its certificate; returns the answer of `qlora export`.

    InputError if options contradict each other, or the folder exists; QloraError if the certificate is above a limit:
    then there is no folder, but the same request with another limit reuses what was written.
    """
    folder = Path(out)
    request.check(folder)
    request.check_source(run.adapter is not None, run.recipe.adapter.kind)
    exporter, dtype = TARGETS[request.to](), _dtype(request, run)
    progress = ProgressReporter(log, "writing the model", "bytes")
    source, options = build_source(run), ExportOptions(request.base, dtype, progress, rank=request.rank)
    with atomic_folder(folder, _resume_key(run, request, dtype)) as partial:
        size = exporter.write(source, partial, options)
        measured = _measure(run, partial, request, options, log)
        table = servers(request.to, partial, out, run.recipe.model.name)
        facts = {"to": request.to, "base": request.base, "dtype": dtype_name(dtype), **measured}
        if request.to != "adapter":
            write_text(partial / MODEL_CARD, _model_card(run, partial, facts))
        (partial / PROGRESS).unlink(missing_ok=True)
    log(f"programs that load {out}:\n{as_text(table)}")
    if run.recipe.data.template_args:
        log(f"its chat template has {_json(run.recipe.data.template_args)} where a server passes no other values")
    if request.to not in FULL_MODELS:
        log("these servers add the adapter to the 16-bit base; `--to merged` keeps the quantized one of training")
        rows = len(run.base.model.get_input_embeddings().weight)  # type: ignore[operator]
        if rows != read_config(run.base.folder.path).get_text_config().vocab_size:
            log(f"PEFT needs as many rows in the base first: model.resize_token_embeddings({rows})")
        for line in base_warning(_manifest(run)):
            log(f"careful: {line}")
    return {
        "path": str(folder), "base": request.base, "dtype": dtype_name(dtype), "bytes": size,
        "agreement": measured.get("agreement"), "rounding": measured.get("rounding"),
        "shortened": measured.get("shortened"),
        "servers": [asdict(server) for server in table],
    }  # fmt: skip


def _json(values: Mapping[str, Any]) -> str:
    return "data.template_args " + json.dumps(dict(values))


def build_source(run: LoadedRun) -> ExportSource:
    """The run as exporters read it; for full fine-tuning its own folder, with an empty adapter."""
    base, own = run.base, run.base.tokenizer.chat_template
    own = own.get("default") if isinstance(own, dict) else own
    text = with_default_arguments(run.encoder.template.text, run.recipe.data.template_args)
    return ExportSource(
        run.adapter or AdapterFile(base.folder.path, {}, {}, None),
        base.folder.path,
        build_quantizer(run.recipe.quant),
        base.manifest.quantized,
        stored_dtype(base.dtype),
        base.device,
        base.model,
        base.tokenizer if run.recipe.adapter.new_tokens else None,
        {path: (module.index.cpu(), module.rows.detach().cpu()) for path, module in token_rows(base.model).items()},
        run.encoder.template,
        tuple(base.tokenizer.convert_ids_to_tokens(list(base.stop_token_ids))),
        base.stop_token_ids,
        run.tokenizer_folder,
        None if text == own else text,
    )


def certify(run: LoadedRun, folder: Path, request: ExportRequest) -> Agreement:
    """Compare the written model with the trained one; its matrices are read from the files when they are used."""
    examples = held_out_examples(run, request.data)[: request.rows or CERTIFICATE_ROWS]
    device, attention = run.base.device, run.recipe.model.attention
    trained: Any = run.base.model
    written = load_lazy_model(folder, _dtype(request, run), attention, device, share_with=trained)
    if not same_device(trained.get_input_embeddings().weight.device, device):
        embed_on_host(written, device)
    return compare(trained, written, examples, device)


def _measure(run: LoadedRun, folder: Path, request: ExportRequest, options: ExportOptions, log: Log) -> dict[str, Any]:
    """Measure what was written, log it, write certificate.json. QloraError above a limit."""
    approximation = summarize_approximation(options.approximation)
    if approximation:
        return _measure_approximation(run, folder, request, approximation, log)
    if request.to not in FULL_MODELS:
        return {}
    rounding = summarize_rounding(options.rounding)
    if options.rounding:
        log(str(rounding))
    agreement = certify(run, folder, request) if request.rows != 0 else None
    if agreement:
        log(f"certificate: {agreement}")
        limits = {"max_kl": _max_kl(request), "max_lost": request.max_lost}
        settings = {"base": request.base, "dtype": dtype_name(options.dtype)}
        write_json(
            folder / CERTIFICATE, asdict(agreement) | settings | {"rounding": rounding.as_json(), "limits": limits}
        )
    _refuse_above_limits(rounding, agreement, request)
    return {"agreement": asdict(agreement) if agreement else None, "rounding": rounding.as_json()}


def _measure_approximation(
    run: LoadedRun, folder: Path, request: ExportRequest, approximation: LowRankApproximation, log: Log
) -> dict[str, Any]:
    """Measure the LoRA nearest to DoRA, log it, write certificate.json. QloraError above --max-kl, if given."""
    log(str(approximation))
    measured: dict[str, Any] = {"shortened": asdict(approximation)}
    if request.rows == 0 or (request.data is None and not has_data(run.recipe)):
        return measured
    examples = held_out_examples(run, request.data)[: request.rows or CERTIFICATE_ROWS]
    agreement = compare_adapters(run, folder, examples)
    log(f"certificate: {agreement}")
    write_json(folder / CERTIFICATE, asdict(agreement) | measured)
    if request.max_kl is not None and not agreement.mean_kl <= request.max_kl:
        raise QloraError(
            f"export: mean KL {agreement.mean_kl:.2e} is above the limit {request.max_kl:g}; nothing was exported. "
            f"Use a higher --rank, or --max-kl {_just_above(agreement.mean_kl)} to export it anyway."
        )
    return measured | {"agreement": asdict(agreement)}


def _refuse_above_limits(rounding: Rounding, agreement: Agreement | None, request: ExportRequest) -> None:
    limit = _max_kl(request)
    if agreement and limit is not None and not agreement.mean_kl <= limit:
        raise QloraError(
            f"export: mean KL {agreement.mean_kl:.2e} is above the limit {limit:g}: the written model is not the "
            "trained one; nothing was exported. "
            f"Use --dtype float32, or --max-kl {_just_above(agreement.mean_kl)} to export it anyway."
        )
    if rounding.relative_error > request.max_lost:
        raise QloraError(
            f"export: {rounding}. The limit is {request.max_lost:.0%}; nothing was exported. Use --dtype float32 or "
            f"float16, or --max-lost {_just_above(rounding.relative_error)} to export it anyway."
        )


def _just_above(value: float) -> str:
    return f"{value * 1.1:.2g}"


def _max_kl(request: ExportRequest) -> float | None:
    """On the original weights the quantization error is missing: the KL is reported, but there is no default limit."""
    return MAX_KL if request.max_kl is None and request.base == MERGE_BASE else request.max_kl


def _model_card(run: LoadedRun, folder: Path, facts: dict[str, Any]) -> str:
    """The export's README, without local paths."""
    name = run.recipe.model.name
    table = servers(facts["to"], folder, "THIS_FOLDER", name if is_hub_name(name) else "BASE")
    return export_model_card(_manifest(run), dump(run.recipe), facts, as_text(table))


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
    """The dtype of a merged model: the run's compute dtype, unless the request has one."""
    if request.dtype is None:
        return run.base.dtype
    return DTYPES[request.dtype]
