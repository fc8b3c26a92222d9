"""Examples joined into one packed sequence, whose documents keep labels, branches, sides and origins."""

from collections.abc import Sequence

import numpy as np

from qlora.data.types import Branch, Example, Side


def join_documents(examples: Sequence[Example]) -> Example:
    """One sequence of several examples, in order."""
    if len(examples) == 1:
        return examples[0]
    starts = np.cumsum([0, *(len(example) for example in examples[:-1])])
    boundaries = [
        int(start) + inner
        for start, example in zip(starts, examples, strict=True)
        for inner in example.document_starts()
    ]
    branches = [
        Branch(int(start) + branch.start, int(start) + branch.parent if branch.parent >= 0 else -1)
        for start, example in zip(starts, examples, strict=True)
        for branch in example.branches
    ]
    return Example(
        where=f"{examples[0].where} and {len(examples) - 1} more",
        input_ids=np.concatenate([example.input_ids for example in examples]),
        labels=np.concatenate([example.labels for example in examples]),
        boundaries=tuple(boundaries[1:]),
        origins=tuple(origin for example in examples for origin in (example.origins or (example.where,))),
        branches=tuple(branches),
        sides=tuple(
            Side(int(start) + side.start, side.role)
            for start, example in zip(starts, examples, strict=True)
            for side in example.sides
        ),
    )
