"""qlora: fine-tune large language models on a frozen 4-bit base, with every promise measured.

Letters used for tensor shapes in the whole house:
    B rows of a micro-batch   T tokens of a row   V vocabulary   I in-features   O out-features
    R rank                    N blocks            K weights per block
"""

import qlora.quiet  # noqa: F401 - before any library that it silences

__version__ = "0.1.0"
