"""Noises of other libraries that a user can't act on, silenced once, before the library that makes them is imported."""

import logging
import os
import warnings

# bitsandbytes looks for an optional CPU package at import; nothing here uses it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# The run says in its own words that a CPU does not page.
warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
# Rust's tokenizer warns about forks that our workers make on purpose.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
