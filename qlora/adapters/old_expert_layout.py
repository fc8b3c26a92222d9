"""Expert updates of PEFT before 0.19.1, which has A and B of a stack [E, O, I] the other way round.

Its lora_A was [E * R, O] and its lora_B [I, R * E], so that the pair of an expert is (B^T, A^T). Their shapes say so,
unless I = O; then the version in adapter_config.json does. Stacks [E, I, O] have had one layout in every version.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from qlora.adapters.peft_files import CONFIG, AdapterFile
from qlora.model.expert_forward import expert_stacks

FIRST_VERSION = (0, 19, 1)


def with_current_layout(file: AdapterFile, model: nn.Module, log: Callable[[str], None]) -> AdapterFile:
    """The adapter with the pairs of every stack of `model` as newer versions of PEFT write them."""
    pairs, swapped = dict(file.pairs), list[str]()
    for path, stack in expert_stacks(model).items():
        first = file.pairs.get(f"{path}.0")
        if first is None or stack.transposed or file.base_sha256 is not None:
            continue
        layer: Any = stack[0]
        shape, expected = (first[1].shape[0], first[0].shape[-1]), (layer.out_features, layer.in_features)
        if shape != expected[::-1] or (shape == expected and not _is_old(file, log)):
            continue
        swapped.append(path)
        for expert in (key for key in file.pairs if key.rpartition(".")[0] == path):
            a, b = file.pairs[expert]
            pairs[expert] = b.t(), a.t()
    if not swapped:
        return file
    log(f"{file.folder}: A and B of {len(swapped)} expert stacks are in the layout of PEFT before 0.19.1: read as such")
    return replace(file, pairs=pairs, is_changed=True)


def _is_old(file: AdapterFile, log: Callable[[str], None]) -> bool:
    """Whether an older PEFT wrote the file; logs that it can't be seen without a version."""
    numbers = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", str(file.config.get("peft_version") or ""))
    if numbers is None:
        log(
            f"careful: {file.folder / CONFIG} names no peft_version: its square expert matrices are read in the layout "
            "of PEFT 0.19.1 and newer. If an older one wrote them, load and save the adapter there first."
        )
        return False
    return tuple(int(number or 0) for number in numbers.groups()) < FIRST_VERSION
