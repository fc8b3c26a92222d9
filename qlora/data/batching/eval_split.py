"""The train/eval split: which examples are held out, a function of their content and the seed."""

import numpy as np
import numpy.typing as npt

from qlora.data.batching.sampler import random_keys
from qlora.data.data_report import Keys


def eval_mask(keys: Keys, fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """True for each held-out example: about `fraction` of them, at least one of two. Equal keys stay together."""
    if fraction <= 0 or len(keys) < 2:
        return np.zeros(len(keys), dtype=bool)
    target = min(max(1, round(fraction * len(keys))), len(keys) - 1)
    distinct, counts = np.unique(keys, return_counts=True)
    picked, examples = list[int](), 0
    for group in np.argsort(random_keys(seed, 0, distinct), kind="stable"):
        if examples == target:
            break
        if examples + counts[group] <= target:
            picked.append(int(group))
            examples += int(counts[group])
    return np.isin(keys, distinct[picked])
