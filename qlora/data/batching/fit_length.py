"""A record's example fitted to data.max_length: whole, in pieces, without some of its answers, or cut off."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora.data.batching.split_text import split
from qlora.data.conversations.build_example import Encoded
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
    example of its own. Otherwise data.overlong decides: left out, or truncated if trained tokens remain.
    """
    example = encoded.example
    if example.branches:
        return _fit_tree(example, section, shares_prefixes)
    if len(example) <= section.max_length:
        return FittedRecord([example])
    kinds = {"auto": (TEXT,), "split": (TEXT, TOKENS)}.get(section.overlong, ())
    if encoded.kind in kinds and section.max_length > 1:
        return FittedRecord(split(example, section.max_length))
    short = [] if section.overlong != "truncate" else _truncated([example], section.max_length)
    return FittedRecord(short, truncated=bool(short))


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
