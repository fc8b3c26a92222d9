"""A head that the files store apart from the embedding, although config.json ties the two.

transformers 5 then uses the stored head, unless its values are the embedding's. Read without torch, for the planner.
"""

import json
import struct
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

HEADS = (
    "lm_head.weight", "embed_out.weight", "output_projection.weight", "proj_out.weight", "head.weight", "output.weight",
    "pred_layer.proj.weight", "predictions.decoder.weight", "lm_head.decoder.weight", "decoder.weight",
    "lm_loss.weight", "generator_lm_head.weight",
)  # fmt: skip
EMBEDDINGS = (
    "embed_tokens.weight", "embed_in.weight", "wte.weight", "word_embeddings.weight", "word_embedding.weight",
    "embeddings.weight", "tok_embeddings.weight", "tokens_embed.weight", "transformer.w.weight",
)  # fmt: skip
FLOATS = ("BF16", "F16", "F32")
MAX_HEADER_BYTES = 100_000_000  # as in the safetensors library
COMPARED_BYTES = 1 << 24  # at a time


class _Stored(NamedTuple):
    """A tensor in a safetensors file: `start` and `size` are bytes."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


def stores_own_head(folder: Path) -> bool:
    """Whether the files of a model folder hold a head whose bytes differ from the embedding's; False if in doubt."""
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    return _compare(tuple((path, path.stat().st_mtime_ns, path.stat().st_size) for path in files))


@lru_cache(maxsize=64)
def _compare(files: tuple[tuple[Path, int, int], ...]) -> bool:
    stored: dict[str, _Stored] = {}
    for path, _, _ in files:
        stored |= _header(path)
    heads = [stored[key] for key in stored if _ends_with(key, HEADS)]
    embeddings = [stored[key] for key in stored if _ends_with(key, EMBEDDINGS)]
    pairs = [(h, e) for h in heads for e in embeddings if h.shape == e.shape and h.dtype == e.dtype and h != e]
    return bool(pairs) and not any(_same_bytes(head, embedding) for head, embedding in pairs)


def _ends_with(key: str, names: tuple[str, ...]) -> bool:
    return any(key == name or key.endswith(f".{name}") for name in names)


def _header(path: Path) -> dict[str, _Stored]:
    """The matrices of a file that may be a head or an embedding; none if the file is damaged, which loading reports."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length < MAX_HEADER_BYTES else {}
        return {
            key: _Stored(path, value["dtype"], tuple(value["shape"]), 8 + length + begin, end - begin)
            for key, value in header.items()
            if key != "__metadata__" and _ends_with(key, HEADS + EMBEDDINGS) and value["dtype"] in FLOATS
            for begin, end in [value["data_offsets"]]
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError, struct.error, RecursionError):
        return {}


def _same_bytes(first: _Stored, second: _Stored) -> bool:
    if first.size != second.size:
        return False
    with first.path.open("rb") as one, second.path.open("rb") as other:
        one.seek(first.start)
        other.seek(second.start)
        for done in range(0, first.size, COMPARED_BYTES):
            size = min(COMPARED_BYTES, first.size - done)
            if one.read(size) != other.read(size):
                return False
    return True
