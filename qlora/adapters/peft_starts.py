"""Which starts of PEFT (`init_lora_weights`) change the base, and what to do about an adapter that had one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora.errors import AdapterError

UNCHANGED = ("eva", "gaussian", "mica", "orthogonal")  # starts that leave the base as it was
COMPUTED_AGAIN = ("pissa", "olora")  # what they subtract follows from the base's weights
CONVERT = (
    "in PEFT, save the adapter again with save_pretrained(FOLDER, path_initial_model_for_weight_conversion=INITIAL), "
    "INITIAL the adapter as saved before training"
)
MERGE = "merge it there (merge_and_unload) and use the merged model"
CHANGED: Mapping[str, str] = {  # beginning of a start's name -> why it can't be computed again, and what to do
    "corda": f"from samples of data: {CONVERT}, or {MERGE}",
    "lora_ga": f"from gradients: {CONVERT}, or {MERGE}",
    "loftq": "to another quantized base than this one: in PEFT, merge it (merge_and_unload), and use the merged model",
    "pissa_niter": f"at random: {CONVERT}, or {MERGE}, where it was trained",
}


def changed_start(path: Path, config: Mapping[str, Any]) -> str | None:
    """`pissa` or `olora` if an adapter's start changed its base and can be computed again; None if it changed nothing.

    path: of the adapter_config.json. AdapterError for a start that can't be computed again, or that is not known.
    """
    start = config.get("init_lora_weights", True)
    if start is None or isinstance(start, bool):
        return None
    name = start.lower() if isinstance(start, str) else ""
    if name in (*UNCHANGED, *COMPUTED_AGAIN):
        return name if name in COMPUTED_AGAIN else None
    where = f"{path}: init_lora_weights: found {str(start)[:80]!r}"
    remedy = next((text for beginning, text in CHANGED.items() if name.startswith(beginning)), None)
    if remedy:
        raise AdapterError(f"{where}, a start that changed the base {remedy}.")
    raise AdapterError(
        f"{where}, which is not known and may have changed the base. If it did not, write true there; if it did: "
        f"{CONVERT}, or {MERGE}."
    )
