"""qlora: fine-tunes large language models on a frozen 4-bit base model.

The Python interface (docs/api.md has the rest); nothing heavy is imported before it is called:

    import qlora
    run = qlora.train(qlora.load_recipe("my.yaml"))
    print(qlora.generate(run, "What is a llama?"))

Letters of tensor shapes in all modules:
    B sequences of a micro-batch   T tokens of a sequence   V vocabulary   I in-features   O out-features
    R rank                         N blocks                 K weights per block
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import qlora.errors
import qlora.utils.library_warnings  # noqa: F401 - before any library that it silences
from qlora._version import __version__

if TYPE_CHECKING:
    from qlora.api import Exported, Run, export, generate, load, load_recipe, plan, train

__all__ = ["Exported", "Run", "__version__", "errors", "export", "generate", "load", "load_recipe", "plan", "train"]


def __getattr__(name: str) -> Any:
    """A name of the public interface, imported on first use."""
    if name in __all__:
        return getattr(import_module("qlora.api"), name)
    raise AttributeError(f"module 'qlora' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
