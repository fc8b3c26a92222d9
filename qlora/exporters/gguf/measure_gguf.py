"""What is measured of a written GGUF file before it counts, and the limits that refuse it."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qlora.data.types import Example
from qlora.exporters import ExportRequest
from qlora.exporters.certificate import refuse_high_kl
from qlora.exporters.gguf import MODEL_FILE
from qlora.exporters.gguf.gguf_certificate import certify_gguf, compare_file_prompts
from qlora.exporters.served_conversations import probe_conversations, refuse_other_prompts
from qlora.runs.load_run import LoadedRun
from qlora.runs.memory_setup import Log


def measure_gguf(
    run: LoadedRun, folder: Path, request: ExportRequest, examples: Sequence[Example], log: Log
) -> dict[str, Any]:
    """The file's prompts and agreement, logged. QloraError for other prompt ids, or a mean KL above the limit."""
    path = folder / MODEL_FILE
    prompts = compare_file_prompts(path, run.base.tokenizer, probe_conversations(run, request.data))
    log(f"careful: {prompts}" if prompts.equal < prompts.compared else str(prompts))
    if not examples:
        return {"conversations": prompts.as_json()}
    refuse_other_prompts(prompts)
    agreement = certify_gguf(run, path, examples)
    log(f"certificate of {MODEL_FILE}: {agreement}")
    refuse_high_kl(agreement, request.kl_limit, f"{MODEL_FILE} is not the trained model", "--dtype float32")
    return {"conversations": prompts.as_json(), "agreement": asdict(agreement)}
