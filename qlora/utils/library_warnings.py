"""Warnings of other libraries that a user can't act on: silenced before the library is imported."""

import logging
import os
import warnings

# bitsandbytes looks for an optional CPU package at import; nothing here uses it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# The run prints its own message that a CPU does not page.
warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
# The tokenizers library warns about forks, which our workers make on purpose.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
