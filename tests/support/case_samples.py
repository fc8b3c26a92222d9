"""Samples of long parameter lists: `make test` runs a part, another one every time; `make slow` runs all of it.

`@pytest.mark.sample(of=3)` keeps one of three cases; `every=("family",)` keeps each value of these parameters.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from zlib import crc32

import pytest

QUICK = "not slow and not clients"  # the mark expression of `make test`


def drawn(cases: Sequence[Mapping[str, object]], of: int, every: Sequence[str], seed: int) -> set[int]:
    """Indices of a sample: one of each `of` neighbors, along a diagonal, so that inner parameters vary too."""
    indices = {index for index in range(len(cases)) if index % of == (index // of + seed) % of} or {seed % len(cases)}
    for name in every:
        values = {repr(cases[index][name]) for index in indices}
        for index in sorted(range(len(cases)), key=lambda index: (index + seed) % len(cases)):
            if repr(cases[index][name]) not in values:
                values.add(repr(cases[index][name]))
                indices.add(index)
    return indices


def mark_samples(items: Sequence[pytest.Item], seed: int, markers: str, arguments: Sequence[str]) -> None:
    """Mark as slow what is not in the sample; with another expression than that of `make test` all cases."""
    sampled = [item for item in items if item.get_closest_marker("sample") and not item.get_closest_marker("slow")]
    for test, group in groupby(sampled, key=lambda item: item.nodeid.partition("[")[0]):
        cases = list(group)
        options = cases[0].get_closest_marker("sample").kwargs  # type: ignore[union-attr]
        parameters = [case.callspec.params for case in cases]  # type: ignore[attr-defined]
        indices = drawn(parameters, options["of"], options.get("every", ()), crc32(f"{seed} {test}".encode()))
        for index, case in enumerate(cases):
            by_name = any(argument.endswith(case.nodeid) for argument in arguments)
            if markers != QUICK or not (index in indices or by_name):
                case.add_marker(pytest.mark.slow)
