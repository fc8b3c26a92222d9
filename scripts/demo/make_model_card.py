"""README.md of the embedded base model, with the losses of its training."""

import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

TEXT = """# The embedded base of `qlora demo`

A Llama of 1.7 million parameters with a byte-level BPE tokenizer of 2048 tokens and a ChatML template, trained from
scratch by this project so that `qlora demo` needs no download. It is there to be fine-tuned in a minute, not to be
useful: it writes English that means little, answers simple questions about a sentence, repeats and remembers.

Made by `python scripts/demo/make_base.py OUT`, seed 0, one thread. Written by that script, with what it measured:

| | steps | last loss (mean of 50 steps) |
|---|---|---|
| random tokens, repeated | {copy_steps} | {copy} |
| prose of the standard library | {read_steps} | {prose} |
| generated conversations (in the same steps) | {read_steps} | {conversations} |

{seconds:.0f} s of training. {versions}

- **Start.** Three heads of the first layer start out attending 1, 2 and 3 tokens back (`make_model.py`); everything
  else is random. Copying then forms within the {copy_steps} steps on random tokens.
- **Prose.** Docstrings and help topics of the Python standard library, paragraphs of prose only (`make_text.py`). They
  are copyright of the Python Software Foundation, under the PSF licence version 2. Another Python version gives
  slightly other text.
- **Conversations.** Generated (`make_tasks.py`): repeat, pick, count, questions about invented people and things. The
  format, the sentences, the names and the cities of the demo's instruction set (`make_data.py`) are not among them.
"""


def write(folder: Path, steps: tuple[int, int], losses: Sequence[float], seconds: float) -> None:
    """Write `folder`/README.md; `losses` are of copying, prose and conversations."""
    copy, prose, conversations = losses
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "tokenizers"))
    text = TEXT.format(
        copy_steps=steps[0],
        read_steps=steps[1],
        copy=copy,
        prose=prose,
        conversations=conversations,
        seconds=seconds,
        versions=f"Python {platform.python_version()}, {packages}, {platform.machine()}.",
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
