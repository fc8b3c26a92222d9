"""Whether the Hugging Face hub can be reached for a data set. Imports no library."""

import os
import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from qlora.errors import DataError
from qlora.utils.paths import similar_path

TRUE = ("1", "ON", "YES", "TRUE")


def require_reachable_hub(name: str, offline: bool | None = None, endpoint: str | None = None) -> None:
    """DataError if the hub's host name can't be resolved: its client would retry for half a minute.

    offline, endpoint: as `datasets` is configured; None: as the environment says.
    """
    if offline is None:
        variables = (os.environ.get(key) for key in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
        offline = next((value for value in variables if value), "").upper() in TRUE
    if offline or getproxies():
        return
    host = urlsplit(endpoint or os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname or ""
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        raise DataError(
            f"{name}: no such file or folder here, and the hub ({host}) can't be reached for a data set of that name. "
            f"With HF_HUB_OFFLINE=1 an earlier download is used.{similar_path(Path(name))}"
        ) from None
