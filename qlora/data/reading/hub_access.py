"""Whether a data set can be had from the Hugging Face hub: its host is known, or an earlier download is here.

Imports no library: `datasets` takes seconds to import, and its client retries for half a minute.
"""

import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from qlora.errors import DataError
from qlora.utils.paths import similar_path

TRUE = ("1", "ON", "YES", "TRUE")
CACHES = {  # variable of the hub's libraries -> the folder below HF_HOME that it replaces
    "HF_DATASETS_CACHE": "datasets",
    "HF_HUB_CACHE": "hub",
    "HUGGINGFACE_HUB_CACHE": "hub",
}


def require_reachable_hub(name: str, offline: bool | None = None, endpoint: str | None = None) -> None:
    """DataError if the hub's host name can't be resolved, or offline if no download of the data set is here.

    offline, endpoint: as `datasets` is configured; None: as the environment says.
    """
    if offline is None and _is_offline():
        return _require_download(name)
    if offline:
        return
    host = urlsplit(endpoint or os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname or ""
    try:
        if not getproxies():
            socket.getaddrinfo(host, 443)
    except OSError:
        raise DataError(
            f"{name}: no such file or folder here, and the hub ({host}) can't be reached for a data set of that name. "
            f"With HF_HUB_OFFLINE=1 an earlier download is used.{similar_path(Path(name))}"
        ) from None


def _is_offline() -> bool:
    variables = (os.environ.get(key) for key in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return next((value for value in variables if value), "").upper() in TRUE


def _require_download(name: str) -> None:
    """DataError unless a cache folder of the hub's libraries has a data set of this name."""
    letters = _letters(name.partition(":")[0])
    if not any(_letters(entry).removeprefix("datasets") == letters for entry in _cached_names()):
        raise DataError(
            f"{name}: no such file or folder here, and no download of a hub data set of that name; HF_HUB_OFFLINE or "
            f"HF_DATASETS_OFFLINE is set. Correct the name, or unset it.{similar_path(Path(name))}"
        )


def _cached_names() -> Iterator[str]:
    """The entries of all cache folders: `owner___name` of `datasets`, `datasets--owner--name` of the hub's client."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    for variable, folder in CACHES.items():
        cache = Path(os.environ.get(variable) or Path(home) / folder).expanduser()
        if cache.is_dir():
            yield from os.listdir(cache)


def _letters(name: str) -> str:
    """A name as the caches write it, whatever they do to capitals and separators."""
    return re.sub(r"[^a-z0-9]", "", name.lower())
