"""Plain text above max_length in consecutive pieces: every token is trained exactly once.

A piece starts with the last token of the piece before it, without loss there: so its first new token has a context.
"""

from qlora.data.types import IGNORED, Example


def split(example: Example, max_length: int) -> list[Example]:
    """The pieces of an example, each of at most `max_length` (at least 2) tokens, without those that train nothing."""
    pieces = []
    for start in range(0, len(example) - 1, max_length - 1):
        ids, labels = (array[start : start + max_length].copy() for array in (example.input_ids, example.labels))
        if start:
            labels[0] = IGNORED
        pieces.append(Example(example.where, ids, labels))
    return [piece for piece in pieces if piece.trained_tokens()]
