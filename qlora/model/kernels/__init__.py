"""Fused GPU kernels of a decoder layer, each beside its reference in plain torch; chosen where right and faster."""
