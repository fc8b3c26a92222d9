"""How many logits the LM head computes at a time. Imports no torch, so that the memory planner can count them."""

# Bytes of float32 logits: enough rows for a matmul to be fast, few enough for a CPU's cache.
LOGITS_CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 256 * 2**20}
