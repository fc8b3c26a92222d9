"""The sides of a record, encoded one by one, joined into one example: a preference pair, or an answer with a label."""

from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import chain

from qlora.data.conversations.build_example import AnswerCounts, Encoded
from qlora.data.pairs import feedback_of, pair_of
from qlora.data.types import ROLES, RecordError, Unused


def join_sides(encoded: Sequence[Encoded | RecordError], roles: Sequence[int]) -> Encoded | RecordError:
    """The encoding of a record from those of its sides; what the report counts is of both."""
    sides = list[Encoded]()
    for item, role in zip(encoded, roles, strict=True):
        if isinstance(item, RecordError):
            detail = f"{ROLES[role]}: {item.detail}" if item.detail else ROLES[role]
            return RecordError(item.reason, detail) if len(roles) > 1 else item
        sides.append(item)
    if len(sides) == 1:
        return replace(sides[0], example=feedback_of(sides[0].example, roles[0]))
    try:
        example = pair_of(sides[0].example.where, sides[0].example, sides[1].example)
    except RecordError as error:
        return error
    return Encoded(
        example,
        tuple(dict.fromkeys(chain.from_iterable(side.control_strings for side in sides))),
        all(side.end_trained for side in sides),
        sum(side.unknown_tokens for side in sides),
        _union([side.unused for side in sides]),
        sides[0].kind,
        _sum([side.answers for side in sides]),
    )


def _union(parts: Sequence[Unused]) -> Unused:
    """What any side holds and training does not use."""
    lists = {
        field.name: tuple(dict.fromkeys(chain.from_iterable(getattr(part, field.name) for part in parts)))
        for field in fields(Unused)
    }
    return Unused(**lists)


def _sum(parts: Sequence[AnswerCounts]) -> AnswerCounts:
    return AnswerCounts(
        sum(part.total for part in parts),
        sum(part.trained for part in parts),
        sum(part.thoughts for part in parts),
        sum(part.trained_thoughts for part in parts),
        tuple(dict.fromkeys(chain.from_iterable(part.merges for part in parts))),
    )
