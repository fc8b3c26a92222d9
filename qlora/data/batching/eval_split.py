"""Which rows are held out for evaluation, as a function of what they say and the seed."""

import numpy as np
import numpy.typing as npt

from qlora.data.batching.sampler import scatter
from qlora.data.data_report import Keys


def held_out(keys: Keys, fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """Which rows are held out, as flags: about `fraction`, at least one of two; equal rows stay together."""
    if fraction <= 0 or len(keys) < 2:
        return np.zeros(len(keys), dtype=bool)
    wanted = min(max(1, round(fraction * len(keys))), len(keys) - 1)
    said, counts = np.unique(keys, return_counts=True)
    picked, rows = list[int](), 0
    for group in np.argsort(scatter(seed, 0, said), kind="stable"):
        if rows == wanted:
            break
        if rows + counts[group] <= wanted:
            picked.append(int(group))
            rows += int(counts[group])
    return np.isin(keys, said[picked])
