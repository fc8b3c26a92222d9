"""The train/eval split: which records are held out, a function of their content and the seed."""

import numpy as np
import numpy.typing as npt

from qlora.data.batching.sampler import random_keys
from qlora.data.data_report import Keys

LARGEST_FRACTION = 0.1  # of the examples, in the one group that is held out where all are larger than the fraction


def eval_mask(keys: Keys, pieces: npt.NDArray[np.int64], fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """True for each held-out record: about `fraction` of all examples, at least one of two. Equal keys stay together.

    pieces: the examples of each record, which stay together too. If every group of equal records has more examples than
    the fraction, the smallest one is held out, unless it has more than LARGEST_FRACTION of them.
    """
    if fraction <= 0 or len(keys) < 2:
        return np.zeros(len(keys), dtype=bool)
    total = int(pieces.sum())
    target = min(max(1, round(fraction * total)), total - 1)
    distinct, group_of = np.unique(keys, return_inverse=True)
    counts = np.bincount(group_of, weights=pieces).astype(np.int64)
    picked, examples = list[int](), 0
    for group in np.argsort(random_keys(seed, 0, distinct), kind="stable"):
        if examples == target:
            break
        if examples + counts[group] <= target:
            picked.append(int(group))
            examples += int(counts[group])
    smallest = int(np.argmin(counts))
    if not picked and len(distinct) > 1 and counts[smallest] <= LARGEST_FRACTION * total:
        picked.append(smallest)
    return np.isin(keys, distinct[picked])


def nothing_held_out(keys: Keys, pieces: npt.NDArray[np.int64], fraction: float) -> str:
    """Why `eval_mask` holds out nothing although a fraction is asked for, and what to do."""
    advice = "Name data.eval, or set data.eval_fraction: 0"
    if len(np.unique(keys)) < 2:
        return f"nothing is held out: all examples are of one record. {advice}"
    _, group_of = np.unique(keys, return_inverse=True)
    smallest, total = int(np.bincount(group_of, weights=pieces).min()), int(pieces.sum())
    return (
        f"nothing is held out: equal records and the pieces of a text stay together, and the smallest such group has "
        f"{smallest:,} of {total:,} examples, more than {max(fraction, LARGEST_FRACTION):.0%}. {advice}"
    )
