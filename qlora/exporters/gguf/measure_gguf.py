"""What is measured of a written GGUF file before it counts, and the limits that refuse it."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qlora.data.types import Example
from qlora.errors import QloraError
from qlora.exporters import MAX_KL, MERGE_BASE, ExportRequest
from qlora.exporters.gguf import FEW_BITS, MODEL_FILE
from qlora.exporters.gguf.gguf_certificate import certify_gguf, compare_file_prompts
from qlora.exporters.served_conversations import probe_conversations, refuse_other_prompts
from qlora.runs.load_run import LoadedRun
from qlora.runs.memory_setup import Log


def measure_gguf(
    run: LoadedRun, folder: Path, request: ExportRequest, examples: Sequence[Example], log: Log
) -> dict[str, Any]:
    """The file's prompts and agreement, logged. QloraError for other prompt ids, or a mean KL above the limit.

    Storages of few bits have no default limit: how far they are from the trained model is theirs, not the export's.
    """
    path = folder / MODEL_FILE
    prompts = compare_file_prompts(path, run.base.tokenizer, probe_conversations(run, request.data))
    log(f"careful: {prompts}" if prompts.equal < prompts.compared else str(prompts))
    if not examples:
        return {"conversations": prompts.as_json()}
    refuse_other_prompts(prompts)
    agreement = certify_gguf(run, path, examples)
    log(f"certificate of {MODEL_FILE}: {agreement}")
    limit = max_kl_of(request)
    if limit is not None and not agreement.mean_kl <= limit:
        raise QloraError(
            f"export: mean KL {agreement.mean_kl:.2e} is above the limit {limit:g}: {MODEL_FILE} is not the trained "
            f"model; nothing was exported. Use --dtype float32, or --max-kl {agreement.mean_kl * 1.1:.2g}."
        )
    return {"conversations": prompts.as_json(), "agreement": asdict(agreement)}


def max_kl_of(request: ExportRequest) -> float | None:
    """The limit of the mean KL: the request's, else the default where the base and the storage have one."""
    has_default = request.base == MERGE_BASE and request.dtype not in FEW_BITS
    return MAX_KL if request.max_kl is None and has_default else request.max_kl
