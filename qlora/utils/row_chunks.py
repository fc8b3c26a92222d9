"""How many rows a row-wise function computes at a time. Imports no torch, so that the memory planner can count them."""

# Bytes in float32 of the rows that are computed at a time: on a CPU so that intermediate values stay in its cache, on
# a GPU so that they take little memory.
CHUNK_BYTES = {"cpu": 4 * 2**20, "cuda": 64 * 2**20}


def chunk_rows(width: int, device: str) -> int:
    """Rows of `width` values that are computed at a time on a kind of device."""
    return max(1, CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"]) // (4 * width))
