"""From examples to micro-batches: filter, store, pack, sample, collate."""
