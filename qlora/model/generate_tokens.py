"""Text generation on token ids: batches of prompts to answers, or one answer token by token.

    p = softmax(logits / temperature),    token = the first with cumulative p > u,    u uniform in [0, 1)

Every row has its own u, from the seed and its prompt alone: what shares its batch, and which rows have ended, changes
no token but for rounding. Temperature 0 takes the largest logit.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from qlora.distributed.unshard import unsharded
from qlora.model.kv_cache import CachedModel, takes_padding
from qlora.model.load_base import Base

BATCH_SIZE = 16  # prompts
BATCH_TOKENS = 2**15  # of all rows of a batch, padding and answers included: what its cache holds


def _ignore(*_: int) -> None:
    """For a caller that shows no progress."""


class RowHooks(NamedTuple):
    """What a caller has to say about the rows of batches; rows are named by the index of their prompt."""

    report: Callable[[int, int], None] = _ignore  # prompts that are answered, and all
    select: Callable[[Sequence[int]], None] = lambda rows: None  # the rows of the next forwards, in order
    is_complete: Callable[[int, Sequence[int]], bool] = lambda row, ids: False  # an answer that ends without end token
    groups: Sequence[Hashable] = ()  # of prompts; equal prompts of one group get different samples


@torch.no_grad()
def generate(
    base: Base,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    hooks: RowHooks = RowHooks(),  # noqa: B008 - a tuple of functions
) -> list[list[int]]:
    """Token ids that follow each prompt, up to and including the end token; temperature 0 is greedy.

    Prompts of similar length share a batch, which a row leaves when it ends.
    """
    draws = {index: random.Random(value) for index, value in enumerate(_seeds(prompts, seed, hooks.groups))}
    answers: list[list[int]] = [[] for _ in prompts]
    model, training, done = CachedModel(base.model), base.model.training, 0
    lengths = [len(prompt) + max_new_tokens for prompt in prompts]
    base.model.eval()
    try:
        head = base.model.get_output_embeddings()  # type: ignore[operator]
        with unsharded(head):  # a sharded head is all-gathered once, and sharded again
            for rows in _batches(lengths, takes_padding(base.model)) if max_new_tokens > 0 else ():
                batch = _Batch(base, model, rows, hooks)
                for index, ids in batch.run(prompts, max_new_tokens, _Sampler(temperature, draws)).items():
                    answers[index] = ids
                done += len(rows)
                hooks.report(done, len(prompts))
    finally:
        base.model.train(training)
    return answers


@torch.no_grad()
def stream_tokens(
    base: Base, prompt: Sequence[int], max_new_tokens: int, temperature: float = 0.0, seed: int = 0
) -> Iterator[int]:
    """The ids of one answer, one at a time, its end token included: those of `generate`.

    A token is computed when it is requested. The active adapter may change between two answers, not within one.
    """
    sampler = _Sampler(temperature, {0: random.Random(_seeds([prompt], seed)[0])})
    base.model.eval()
    model = CachedModel(base.model)
    logits = model.start([prompt]) if max_new_tokens > 0 else None
    for count in range(1, max_new_tokens + 1):
        assert logits is not None  # there is a token to choose
        (token,) = sampler.tokens(logits, [0])
        yield token
        if token in base.stop_token_ids or count == max_new_tokens:
            return
        logits = model.append([token])


class _Sampler(NamedTuple):
    """The next token of each row."""

    temperature: float
    draws: Mapping[int, random.Random]

    def tokens(self, logits: Tensor, rows: Sequence[int]) -> list[int]:
        """A token of each row, from its logits [B, V]; `rows` are the prompts' indices."""
        if self.temperature == 0:
            return logits.argmax(-1).tolist()  # type: ignore[no-any-return]
        logits = logits.cpu() if logits.device.type == "mps" else logits  # which has no float64
        cumulative = (logits.double() / self.temperature).softmax(-1).cumsum(-1)
        draws = torch.tensor([[self.draws[row].random()] for row in rows], dtype=torch.double, device=logits.device)
        tokens = torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True)
        return tokens[:, 0].clamp(max=logits.shape[-1] - 1).tolist()  # type: ignore[no-any-return]


class _Batch:
    """Rows that are answered together."""

    def __init__(self, base: Base, model: CachedModel, rows: Sequence[int], hooks: RowHooks) -> None:
        self._model, self._hooks, self._stops = model, hooks, frozenset(base.stop_token_ids)
        # All ranks run every forward of a sharded model, so that none waits for a row that ended elsewhere.
        self._keeps_rows = any(hasattr(parameter, "to_local") for parameter in base.model.parameters())
        self._rows = list(rows)  # of the batch, in order
        self._answers: dict[int, list[int]] = {row: [] for row in rows}
        self._ended: set[int] = set()

    def run(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampler: _Sampler) -> dict[int, list[int]]:
        """The answer of each row, by the index of its prompt."""
        self._hooks.select(self._rows)
        logits = self._model.start([prompts[row] for row in self._rows])
        for count in range(1, max_new_tokens + 1):
            tokens = sampler.tokens(logits, self._rows)
            self._add(tokens)
            if count == max_new_tokens or (len(self._ended) == len(self._answers) and not self._keeps_rows):
                break
            logits = self._model.append(self._leave(tokens))
        return self._answers

    def _add(self, tokens: Sequence[int]) -> None:
        for row, token in zip(self._rows, tokens, strict=True):
            if row in self._ended:
                continue
            answer = self._answers[row]
            answer.append(token)
            if token in self._stops or self._hooks.is_complete(row, answer):
                self._ended.add(row)

    def _leave(self, tokens: Sequence[int]) -> Sequence[int]:
        """Let rows that have ended leave the batch where the cache allows it; returns the tokens of those that stay."""
        places = [place for place, row in enumerate(self._rows) if row not in self._ended]
        if self._keeps_rows or len(places) == len(self._rows) or not self._model.keep(places):
            return tokens
        self._rows = [self._rows[place] for place in places]
        self._hooks.select(self._rows)
        return [tokens[place] for place in places]


def _batches(lengths: Sequence[int], mixes_lengths: bool) -> Iterator[list[int]]:
    """Indices of the prompts of each batch: of similar length, or all of one length. `lengths`: with the answers."""
    by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
    for _, group in groupby(by_length, key=lambda index: 0 if mixes_lengths else lengths[index]):
        batch = list[int]()
        for index in group:
            is_full = len(batch) == BATCH_SIZE or (len(batch) + 1) * lengths[index] > BATCH_TOKENS
            if batch and is_full:
                yield batch
                batch = []
            batch.append(index)
        yield batch


def _seeds(prompts: Sequence[Sequence[int]], seed: int, groups: Sequence[Hashable] = ()) -> list[int]:
    """A seed for each prompt: of `seed`, its ids, and how often it came before in its group."""
    counts, seeds = Counter[Hashable](), list[int]()
    for index, prompt in enumerate(prompts):
        key = (groups[index] if groups else None, tuple(prompt))
        text = repr((seed, counts[key], [int(token) for token in prompt]))
        seeds.append(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]))
        counts[key] += 1
    return seeds
