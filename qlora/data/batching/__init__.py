"""Examples as micro-batches: filter, store, cache, pack, sample, collate."""
