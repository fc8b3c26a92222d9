"""What is measured of a written export before it counts: agreement with the trained model, rounding, prompt ids."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qlora.data.types import Example
from qlora.errors import InputError, QloraError
from qlora.exporters import ADAPTERS, FULL_MODELS, ExportRequest
from qlora.exporters.adapter_agreement import compare_adapters, compare_on_16_bit_base, has_16_bit_base
from qlora.exporters.certificate import (
    Agreement,
    Rounding,
    compare,
    just_above,
    refuse_high_kl,
    summarize_rounding,
)
from qlora.exporters.export_source import ExportOptions
from qlora.exporters.gguf import MODEL_FILE
from qlora.exporters.gguf.measure_gguf import measure_gguf
from qlora.exporters.portable import summarize_approximation
from qlora.exporters.reader_rules import ReaderFinding, findings
from qlora.exporters.served_conversations import compare_conversations, probe_conversations, refuse_other_prompts
from qlora.memory.weight_streaming import embed_on_host
from qlora.model.download import tokenizer_files
from qlora.model.dtypes import DTYPES, dtype_name
from qlora.model.lazy_model import load_lazy_model
from qlora.recipe.default_recipe import has_data
from qlora.runs.load_run import LoadedRun, held_out_examples
from qlora.runs.memory_setup import Log
from qlora.utils.atomic_files import write_json
from qlora.utils.devices import same_device

CERTIFICATE = "certificate.json"
CERTIFICATE_ROWS = 128  # held-out examples of a certificate, if `--rows` is not given
ADAPTER_ROWS = 32  # for an adapter on the 16-bit base, whose matrices are read again for each few of them


def measure(run: LoadedRun, folder: Path, request: ExportRequest, options: ExportOptions, log: Log) -> dict[str, Any]:
    """Measure what was written, log it, write certificate.json. QloraError above a limit, or for other prompt ids."""
    measured: dict[str, Any] = {}
    is_file, is_folder = (folder / MODEL_FILE).is_file(), request.to in FULL_MODELS
    if not is_file and (request.to in (*FULL_MODELS, *ADAPTERS) or tokenizer_files(folder)):
        prompts = compare_conversations(probe_conversations(run, request.data), folder)
        log(f"careful: {prompts}" if prompts.equal < prompts.compared else str(prompts))
        if request.rows != 0:
            refuse_other_prompts(prompts)
        measured["conversations"] = prompts.as_json()
    if is_file:
        measured |= _measure_file(run, folder, request, options, log)
    elif is_folder:
        measured |= _measure_model(run, folder, request, options, log)
    elif request.to in ADAPTERS:
        measured |= _measure_adapter(run, folder, request, options, log)
    if request.rows != 0:
        write_json(folder / CERTIFICATE, _certificate(measured, request, options))
    if is_folder and not is_file:
        measured["findings"] = [asdict(finding) for finding in _log_findings(folder, log)]
    return measured


def _log_findings(folder: Path, log: Log) -> list[ReaderFinding]:
    """What some readers make of the folder's configuration, a line each."""
    results = findings(folder)
    for finding in results:
        log(f"careful: {finding}")
    return results


def certify(run: LoadedRun, folder: Path, request: ExportRequest) -> Agreement:
    """Compare the written model with the trained one; its matrices are read from the files when they are used."""
    examples = held_out_examples(run, request.data)[: request.rows or CERTIFICATE_ROWS]
    device, attention = run.base.device, run.recipe.model.attention
    trained: Any = run.base.model
    dtype = DTYPES[request.dtype] if request.dtype else run.base.dtype
    written = load_lazy_model(folder, dtype, attention, device, share_with=trained)
    if not same_device(trained.get_input_embeddings().weight.device, device):
        embed_on_host(written, device)
    return compare(trained, written, examples, device)


def _certificate(measured: dict[str, Any], request: ExportRequest, options: ExportOptions) -> dict[str, Any]:
    """The content of certificate.json: the agreement's figures, and what they were measured with."""
    figures = {key: value for key, value in measured.items() if key != "agreement" and value is not None}
    content = (measured.get("agreement") or {}) | figures
    if request.to == "gguf":
        return content | {"base": request.base, "dtype": options.storage, "limits": {"max_kl": request.kl_limit}}
    if request.to not in FULL_MODELS:
        return content
    limits = {"max_kl": request.kl_limit, "max_lost": request.max_lost}
    return content | {"base": request.base, "dtype": dtype_name(options.dtype), "limits": limits}


def _rounding(options: ExportOptions, log: Log) -> Rounding:
    rounding = summarize_rounding(options.rounding)
    if options.rounding:
        log(str(rounding))
    return rounding


def _measure_model(
    run: LoadedRun, folder: Path, request: ExportRequest, options: ExportOptions, log: Log
) -> dict[str, Any]:
    rounding = _rounding(options, log)
    agreement = certify(run, folder, request) if request.rows != 0 else None
    if agreement:
        log(f"certificate: {agreement}")
    _refuse_above_limits(rounding, agreement, request)
    return {"agreement": asdict(agreement) if agreement else None, "rounding": rounding.as_json()}


def _measure_file(
    run: LoadedRun, folder: Path, request: ExportRequest, options: ExportOptions, log: Log
) -> dict[str, Any]:
    rounding = _rounding(options, log)
    examples = held_out_examples(run, request.data)[: request.rows or CERTIFICATE_ROWS] if request.rows != 0 else []
    measured = measure_gguf(run, folder, request, examples, log)
    _refuse_above_limits(rounding, None, request)
    return measured | {"rounding": rounding.as_json()}


def _measure_adapter(
    run: LoadedRun, folder: Path, request: ExportRequest, options: ExportOptions, log: Log
) -> dict[str, Any]:
    """The adapter on the 16-bit base, as servers compute; a LoRA nearest to DoRA on the base of training too."""
    approximation = summarize_approximation(options.approximation)
    if approximation:
        log(str(approximation))
    measured: dict[str, Any] = {"shortened": asdict(approximation)} if approximation else {}
    if request.rows == 0:
        return measured
    examples = _examples_of_adapter(run, request, log)
    if approximation and examples:
        agreement = _measure_approximation(run, folder, request, examples[: request.rows or CERTIFICATE_ROWS])
        log(f"certificate: {agreement}")
        measured["agreement"] = asdict(agreement)
    served = _measure_served(run, folder, request, examples[: request.rows or ADAPTER_ROWS], log)
    if served:
        measured["served"] = asdict(served)
        measured.setdefault("agreement", measured["served"])
    return measured


def _examples_of_adapter(run: LoadedRun, request: ExportRequest, log: Log) -> Sequence[Example]:
    """The held-out examples; none, with a line, where there are none: an adapter can be written without them."""
    hint = "--data FILE measures what servers compute with it"
    if request.data is None and not has_data(run.recipe):
        log(f"not measured: an adapter without a run has no held-out examples; {hint}")
        return []
    try:
        return held_out_examples(run, request.data)
    except InputError as error:
        if request.data:
            raise
        log(f"not measured: {error} {hint}")
        return []


def _measure_served(
    run: LoadedRun, folder: Path, request: ExportRequest, examples: Sequence[Example], log: Log
) -> Agreement | None:
    """Agreement of the 16-bit base and the written adapter with the trained model; None where it can't be measured."""
    if not examples:
        return None
    if not has_16_bit_base(run):
        log("not measured: this base is stored in 4 bits; servers that load it in 16 bits are further from training")
        return None
    agreement = compare_on_16_bit_base(run, folder, examples)
    log(f"on the 16-bit base, as servers compute, against the trained model: {agreement}")
    remedy = "--to merged, which keeps the quantized base of training"
    refuse_high_kl(agreement, request.max_kl, "with the 16-bit base it is another model", remedy)
    return agreement


def _measure_approximation(
    run: LoadedRun, folder: Path, request: ExportRequest, examples: Sequence[Example]
) -> Agreement:
    """Measure the LoRA nearest to DoRA on the base of training. QloraError above --max-kl, if given."""
    agreement = compare_adapters(run, folder, examples)
    refuse_high_kl(agreement, request.max_kl, "the LoRA is too far from DoRA", "a higher --rank")
    return agreement


def _refuse_above_limits(rounding: Rounding, agreement: Agreement | None, request: ExportRequest) -> None:
    if agreement:
        refuse_high_kl(agreement, request.kl_limit, "the written model is not the trained one", "--dtype float32")
    if rounding.relative_error > request.max_lost:
        raise QloraError(
            f"export: {rounding}. The limit is {request.max_lost:.0%}; nothing was exported. Use --dtype float32 or "
            f"float16, or --max-lost {just_above(rounding.relative_error)} to export it anyway."
        )
