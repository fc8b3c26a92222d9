"""Answers from a model: batches of prompts in, token ids out, or one answer token by token.  Door: transformers."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from qlora.model.load_base import Base

BATCH_ROWS = 16


@torch.no_grad()
def generate(
    base: Base,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[int]]:
    """Token ids that follow each prompt, up to and including the end token; temperature 0 is greedy.

    Prompts of like length share a batch, padded on the left; sampling starts from `seed`.
    """
    torch.manual_seed(seed)
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    answers: list[list[int]] = [[] for _ in prompts]
    training = base.model.training
    base.model.eval()
    for start in range(0, len(order), BATCH_ROWS):
        rows = order[start : start + BATCH_ROWS]
        for row, answer in zip(
            rows, _batch(base, [prompts[row] for row in rows], max_new_tokens, temperature), strict=True
        ):
            answers[row] = answer
        report(min(start + BATCH_ROWS, len(order)), len(order))
    base.model.train(training)
    return answers


@torch.no_grad()
def stream(
    base: Base, prompt: Sequence[int], max_new_tokens: int, temperature: float = 0.0, seed: int = 0
) -> Iterator[int]:
    """The ids of one answer as they come, its end token included; temperature 0 is greedy, as in `generate`.

    Stop asking and the work stops; which adapter acts may change between two answers, not within one.
    """
    model: Any = base.model.eval()
    generator = torch.Generator(base.device).manual_seed(seed)
    ids = torch.tensor([list(prompt)], device=base.device)
    cache = None
    for _ in range(max_new_tokens):
        found = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, logits = found.past_key_values, found.logits[0, -1].float()
        if temperature > 0:
            ids = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[None]
        else:
            ids = logits.argmax()[None, None]
        token = int(ids)
        yield token
        if token in base.stops:
            return


def _batch(base: Base, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float) -> list[list[int]]:
    width = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, width - len(prompt) :] = 1
    model: Any = base.model
    found = model.generate(
        input_ids=ids.to(base.device),
        attention_mask=mask.to(base.device),
        generation_config=_settings(base, max_new_tokens, temperature),
        # Every process takes part in every token of a sharded model until the last one has its answers.
        synced_gpus=any(hasattr(parameter, "to_local") for parameter in model.parameters()),
    )
    return [_until_stop(row[width:].tolist(), base.stops) for row in found]


def _settings(base: Base, max_new_tokens: int, temperature: float) -> GenerationConfig:
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    stops = list(base.stops) or None
    pad = stops[0] if stops else 0
    return GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=stops, pad_token_id=pad, **sampling)


def _until_stop(ids: list[int], stops: Sequence[int]) -> list[int]:
    """An answer ends with its first end token; what pads the batch after it is cut."""
    end = next((position for position, token in enumerate(ids) if token in stops), len(ids) - 1)
    return ids[: end + 1]
