"""Training data of the embedded base model: three endless streams of batches, each a pure function of its seed.

A batch is a pair of ids and labels, both [B, T]; a label is the id itself or -100, unshifted.
"""

from collections.abc import Iterator
from random import Random

import torch
from make_model import START
from make_scenes import Turn
from make_tasks import Lexicon, make_task
from torch import Tensor
from transformers import PreTrainedTokenizerFast

Batch = tuple[Tensor, Tensor]

IGNORED = -100
FIRST_ORDINARY = 4  # lower ids are control tokens
PERIODS = (8, 40)  # tokens before a row of copies repeats
POOL = 16  # batches of conversations that are sorted by length together


def copies(rows: int, tokens: int, vocabulary: int, seed: int) -> Iterator[Batch]:
    """Random tokens that repeat, each row with another period; the first period has no labels."""
    random = Random(seed)
    while True:
        ids, labels = torch.empty(rows, tokens, dtype=torch.int64), torch.full((rows, tokens), IGNORED)
        for row in range(rows):
            period = random.randint(*PERIODS)
            tokens_of_period = torch.tensor([random.randrange(FIRST_ORDINARY, vocabulary) for _ in range(period)])
            ids[row] = tokens_of_period.repeat(tokens // period + 1)[:tokens]
            labels[row, period:] = ids[row, period:]
        yield ids, labels


def prose(rows: int, tokens: int, texts: list[str], tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[Batch]:
    """The documents as one stream, shuffled in each epoch and cut into rows; every token is labeled."""
    random = Random(seed)
    encoded = [tokenizer.encode(START + text, add_special_tokens=False, verbose=False) for text in texts]
    stream: list[int] = []
    while True:
        random.shuffle(encoded)
        stream += [token for ids in encoded for token in ids]
        while len(stream) >= rows * tokens:
            ids = torch.tensor(stream[: rows * tokens]).view(rows, tokens)
            del stream[: rows * tokens]
            yield ids, ids


def conversations(rows: int, lexicon: Lexicon, tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[Batch]:
    """Generated conversations; the assistant's words and its end-of-turn token are labeled."""
    random = Random(seed)
    while True:
        # A batch has conversations of similar length, so that there is little padding.
        pool = [_tokens(make_task(random, lexicon), tokenizer) for _ in range(rows * POOL)]
        pool.sort(key=lambda pair: len(pair[0]))
        groups = [pool[start : start + rows] for start in range(0, len(pool), rows)]
        random.shuffle(groups)
        for group in groups:
            yield _padded(group, tokenizer)


def _tokens(turn: Turn, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], int]:
    """The ids of a conversation, and how many of them are the prompt."""
    message = {"role": "user", "content": turn[0]}
    prompt = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    return ids + tokenizer.encode(f"{turn[1]}{tokenizer.eos_token}", add_special_tokens=False), len(ids)


def _padded(group: list[tuple[list[int], int]], tokenizer: PreTrainedTokenizerFast) -> Batch:
    width = max(len(ids) for ids, _ in group)
    ids, labels = torch.full((len(group), width), int(tokenizer.pad_token_id)), torch.full((len(group), width), IGNORED)
    for row, (tokens, prompt) in enumerate(group):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, prompt : len(tokens)] = torch.tensor(tokens[prompt:])
    return ids, labels
