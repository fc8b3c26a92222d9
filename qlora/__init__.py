"""qlora: fine-tune large language models on a frozen 4-bit base, with every promise measured.

In three lines (docs/api.md says the rest; nothing heavy is imported before it is called):

    import qlora
    run = qlora.train(qlora.load_recipe("my.yaml"))
    print(qlora.generate(run, "What is a llama?"))

Letters used for tensor shapes in the whole house:
    B rows of a micro-batch   T tokens of a row   V vocabulary   I in-features   O out-features
    R rank                    N blocks            K weights per block
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

import qlora.errors
import qlora.quiet  # noqa: F401 - before any library that it silences

if TYPE_CHECKING:
    from qlora.api import Exported, Run, export, generate, load, load_recipe, plan, train

__version__ = "0.1.0"
__all__ = ["Exported", "Run", "__version__", "errors", "export", "generate", "load", "load_recipe", "plan", "train"]
_ROOMS = ("train", "export")  # public functions that share their name with a room


class _Room(ModuleType):
    """A room that can be called: `qlora.train` is the package qlora/train/ and, called, the function of that name."""

    @property
    def __signature__(self) -> Any:
        """What editors and notebooks show: the function's."""
        from inspect import signature

        return signature(_public(self.__name__.rpartition(".")[2]))

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return _public(self.__name__.rpartition(".")[2])(*arguments, **named)


class _Face(ModuleType):
    """The package itself, which makes those rooms callable as they are imported, whoever imports them."""

    # As the data model has it: docs.python.org/3/reference/datamodel.html#customizing-module-attribute-access
    def __setattr__(self, name: str, value: Any) -> None:
        if name in _ROOMS and isinstance(value, ModuleType):
            value.__class__ = _Room
        super().__setattr__(name, value)


def _public(name: str) -> Any:
    return getattr(import_module("qlora.api"), name)


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"qlora.{name}")
    if name in __all__:
        return _public(name)
    raise AttributeError(f"module 'qlora' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Face
