"""Spectra of an adapter's updates by module path; the experts of a stack have one, their mean."""

from collections.abc import Mapping

import torch

from qlora.adapters.expert_keys import Pair, stack_of
from qlora.adapters.peft_config import module_settings
from qlora.adapters.peft_files import AdapterFile
from qlora.adapters.spectrum import Spectrum, mean_spectrum, spectrum


def update_spectra(file: AdapterFile) -> dict[str, Spectrum]:
    """Path of a matrix, or of a stack of experts -> spectrum, in the file's order."""
    spectra: dict[str, Spectrum] = {}
    for path, members in by_stack(file).items():
        (a, b), *_ = members.values()
        scaling = module_settings(file.config, next(iter(members)), a.shape[0]).scaling
        if path in members:
            spectra[path] = spectrum(a, b, scaling)
        else:
            stacked_a, stacked_b = (torch.stack([pair[side] for pair in members.values()]) for side in (0, 1))
            spectra[path] = mean_spectrum(stacked_a, stacked_b, scaling)
    return spectra


def by_stack(file: AdapterFile) -> Mapping[str, Mapping[str, Pair]]:
    """Path of a matrix or of a stack -> its pairs by path: one, or those of all experts."""
    groups: dict[str, dict[str, Pair]] = {}
    for path, pair in file.pairs.items():
        groups.setdefault(stack_of(file.config, path) or path, {})[path] = pair
    return groups
