"""The data sets of a recipe: the sources of data.train and data.eval, with their files and digests of their content."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora.data.reading import source
from qlora.data.reading.resolve_paths import ResolvedSource, resolve_source
from qlora.errors import DataError

if TYPE_CHECKING:
    from qlora.data import Data, Source


@dataclass(frozen=True)
class DataSet:
    """The sources of one recipe key, with the files of each and a digest of their content."""

    key: str
    sources: "Sequence[Source]"
    resolved: list[ResolvedSource]
    digests: list[str]


def read_data_sets(section: "Data") -> tuple[DataSet, DataSet]:
    """Those of data.train and of data.eval. DataError for a missing source."""
    data_sets = []
    for key, sources in (("data.train", section.train), ("data.eval", section.eval or ())):
        resolved = [resolve_source(item) for item in sources]
        digests = [source.sha256(item, location) for item, location in zip(sources, resolved, strict=True)]
        data_sets.append(DataSet(key, sources, resolved, digests))
    return data_sets[0], data_sets[1]


def require_unchanged(data_sets: Sequence[DataSet]) -> None:
    """DataError if the content of a file differs from its digest in `data_sets`."""
    for data_set in data_sets:
        for item, resolved, digest in zip(data_set.sources, data_set.resolved, data_set.digests, strict=True):
            if resolved.files and source.sha256(item, resolved) != digest:
                raise DataError(f"{item.path}: changed while it was read. Start again when nothing writes to it.")


def count_records(data_sets: Sequence[DataSet]) -> int | None:
    """The records of all data sets; None if one does not say how many it has."""
    pairs = (pair for data_set in data_sets for pair in zip(data_set.sources, data_set.resolved, strict=True))
    counts = [source.count_records(*pair) for pair in pairs]
    return None if None in counts else sum(count for count in counts if count is not None)
