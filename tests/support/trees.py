"""Prefix trees for tests: drawn segments of sequences, what each token sees, and examples of several paths."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from qlora.data.prefix_tree import merge_paths
from qlora.data.types import IGNORED, Branch, Example

# As Qwen3's: thoughts are kept after the last question only.
REWRITES_THE_PAST = (
    "{%- set ns = namespace(last=0) %}"
    "{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{%- if m.reasoning_content and loop.index0 > ns.last %}"
    "{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
Starts = tuple[tuple[int, ...], ...]
Branches = tuple[tuple[Branch, ...], ...]


@st.composite
def layouts(draw: Any, length: int) -> tuple[tuple[int, ...], tuple[Branch, ...]]:
    """Document starts and branches of a sequence; a branch continues any earlier token of its document."""
    bounds = sorted(draw(st.sets(st.integers(1, max(1, length - 1)), max_size=6)) - {length})
    starts, branches = [0], []
    for bound in bounds:
        parent = draw(st.integers(starts[-1] - 1, bound - 1))
        if parent < starts[-1]:
            starts.append(bound)
        else:
            branches.append(Branch(bound, parent))
    return tuple(starts), tuple(branches)


def dense_mask(starts: Starts, branches: Branches, length: int, window: int | None) -> Tensor:
    """Bool [B, 1, T, T]: a token sees itself and its ancestors, the nearest `window` of them."""
    mask = torch.zeros(len(starts), 1, length, length, dtype=torch.bool)
    for row, (begins, sequence) in enumerate(zip(starts, branches, strict=True)):
        parents = {begin: -1 for begin in begins} | dict(sequence)
        for token in range(length):
            seen, at = 0, token
            while at >= 0 and (window is None or seen < window):
                mask[row, 0, token, at] = True
                seen, at = seen + 1, parents.get(at, at - 1)
    return mask


def tree_of(seed: int, turns: int = 3, where: str = "rows.jsonl:1", size: int = 6) -> Example:
    """The example of a conversation whose answers are rewritten once they are in the past: one path an answer."""
    draw = np.random.default_rng(seed)
    history, paths = draw.integers(5, 60, size), []
    for _ in range(turns):
        answer = draw.integers(60, 90, draw.integers(2, size))
        ids = np.concatenate([history, answer]).astype(np.int32)
        paths.append((ids, np.where(np.arange(len(ids)) < len(history), IGNORED, ids).astype(np.int32)))
        history = np.concatenate([history, answer[1:], draw.integers(5, 60, size)])
    return merge_paths(where, paths)


def write_rewritten(folder: Path, records: int) -> Path:
    """`template.jinja`, which rewrites the past, and `records.jsonl`: one to three answers with thoughts each."""
    (folder / "template.jinja").write_text(REWRITES_THE_PAST)
    with (folder / "records.jsonl").open("w") as file:
        for number in range(records):
            messages = []
            for turn in range(1 + number % 3):
                thought = f"{number} plus {turn} is {number + turn}"
                messages += [
                    {"role": "user", "content": f"{number}+{turn}?"},
                    {"role": "assistant", "content": f"{number + turn}", "reasoning_content": thought},
                ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return folder
