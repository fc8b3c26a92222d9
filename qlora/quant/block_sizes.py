"""Block sizes of blockwise quantization. Imports no torch: the recipe's schema and the memory planner read them too."""

from typing import Literal, get_args

# Weights that share one absmax; bitsandbytes has kernels for these sizes.
Block = Literal[32, 64, 128, 256, 512, 1024, 2048, 4096]
BLOCKS: tuple[int, ...] = get_args(Block)
NESTED_BLOCK = 256  # absmax values that share one nested absmax in double quantization; fixed by bitsandbytes
