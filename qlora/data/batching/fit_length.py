"""A record's example fitted to data.max_length: whole, in pieces, without some of its answers, or cut off."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora.data.batching.split_text import split
from qlora.data.conversations.build_example import Encoded
from qlora.data.pairs import apart
from qlora.data.prefix_tree import count_answers, paths_of, split_tree
from qlora.data.types import TEXT, TOKENS, Example

if TYPE_CHECKING:
    from qlora.data import Data


@dataclass(frozen=True)
class FittedRecord:
    """What is trained of a record; no examples: nothing of it fits."""

    examples: list[Example]
    overlong_answers: int = 0  # answers left out, since they and their context are above max_length
    truncated: bool = False


def fit_length(encoded: Encoded, section: "Data", shares_prefixes: bool = True) -> FittedRecord:
    """The examples of a record, each of at most max_length tokens.

    Plain text is split. A prefix tree above max_length becomes several; without `shares_prefixes`, each answer is an
    example of its own. Otherwise data.overlong decides: left out, or truncated if trained tokens remain. An example
    of sides is whole or left out: a preference for a whole answer says nothing about a part of it.
    """
    example = encoded.example
    if example.sides:
        return _fit_sides(example, section, shares_prefixes)
    if example.branches:
        return _fit_tree(example, section, shares_prefixes)
    if len(example) <= section.max_length:
        return FittedRecord([example])
    kinds = {"auto": (TEXT,), "split": (TEXT, TOKENS)}.get(section.overlong, ())
    if encoded.kind in kinds and section.max_length > 1:
        return FittedRecord(split(example, section.max_length))
    short = [] if section.overlong != "truncate" else _truncated([example], section.max_length)
    return FittedRecord(short, truncated=bool(short))


def _fit_sides(example: Example, section: "Data", shares_prefixes: bool) -> FittedRecord:
    example = example if shares_prefixes else apart(example)
    in_one_row = shares_prefixes or section.packing
    ends = [*example.document_starts()[1:], len(example)]
    lengths = [end - start for start, end in zip(example.document_starts(), ends, strict=True)]
    longest = sum(lengths) if in_one_row else max(lengths)
    return FittedRecord([example] if longest <= section.max_length else [])


def _fit_tree(example: Example, section: "Data", shares_prefixes: bool) -> FittedRecord:
    if shares_prefixes and len(example) <= section.max_length:
        return FittedRecord([example])
    paths = paths_of(example)
    overlong = [path for path in paths if len(path) > section.max_length]
    fitting = [path for path in paths if len(path) <= section.max_length]
    short = _truncated(overlong, section.max_length) if section.overlong == "truncate" else []
    examples = split_tree([*fitting, *short], section.max_length) if shares_prefixes else [*fitting, *short]
    lost = sum(map(count_answers, overlong)) - sum(map(count_answers, short))
    return FittedRecord(examples, lost, truncated=bool(short))


def _truncated(examples: list[Example], length: int) -> list[Example]:
    """The first `length` tokens of each example that has trained ones among them."""
    short = [Example(item.where, item.input_ids[:length], item.labels[:length]) for item in examples]
    return [example for example in short if example.trained_tokens()]
