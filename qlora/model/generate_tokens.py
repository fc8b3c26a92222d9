"""Text generation on token ids: batches of prompts to answers, or one answer token by token."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from qlora.model.load_base import Base

BATCH_SIZE = 16


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

    Prompts of similar length share a batch, padded on the left; sampling starts from `seed`.
    """
    torch.manual_seed(seed)
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: list[list[int]] = [[] for _ in prompts]
    training = base.model.training
    base.model.eval()
    for start in range(0, len(by_length), BATCH_SIZE):
        indices = by_length[start : start + BATCH_SIZE]
        batch = _generate_batch(base, [prompts[index] for index in indices], max_new_tokens, temperature)
        for index, answer in zip(indices, batch, strict=True):
            answers[index] = answer
        report(min(start + BATCH_SIZE, len(by_length)), len(by_length))
    base.model.train(training)
    return answers


@torch.no_grad()
def stream_tokens(
    base: Base, prompt: Sequence[int], max_new_tokens: int, temperature: float = 0.0, seed: int = 0
) -> Iterator[int]:
    """The ids of one answer, one at a time, its end token included; temperature 0 is greedy, as in `generate`.

    A token is computed when it is requested. The active adapter may change between two answers, not within one.
    """
    model: Any = base.model.eval()
    generator = torch.Generator(base.device).manual_seed(seed)
    ids = torch.tensor([list(prompt)], device=base.device)
    names = inspect.signature(type(model).forward).parameters
    cache, count = None, len(prompt)
    for _ in range(max_new_tokens):
        positions = torch.arange(count - ids.shape[1], count, device=base.device)[None]
        options = {"position_ids": positions, "cache": cache, "use_cache": True, "logits_to_keep": 1}
        output = model(input_ids=ids, **{name: value for name, value in options.items() if name in names})
        cache, logits = getattr(output, "cache", None), output.logits[0, -1].float()
        if temperature > 0:
            token = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
        else:
            token = int(logits.argmax())
        following = ids.new_tensor([[token]])
        ids, count = torch.cat([ids, following], dim=1) if cache is None else following, count + 1
        yield token
        if token in base.stop_token_ids:
            return


def _generate_batch(
    base: Base, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float
) -> list[list[int]]:
    width = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, width - len(prompt) :] = 1
    model: Any = base.model
    sequences = model.generate(
        input_ids=ids.to(model.device),  # of its first parameter, an embedding that may be on the host
        attention_mask=mask.to(model.device),
        generation_config=_generation_config(base, max_new_tokens, temperature),
        # All ranks run every forward of a sharded model until the last rank is finished.
        synced_gpus=any(hasattr(parameter, "to_local") for parameter in model.parameters()),
    )
    return [_until_stop(sequence[width:].tolist(), base.stop_token_ids) for sequence in sequences]


def _generation_config(base: Base, max_new_tokens: int, temperature: float) -> GenerationConfig:
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    stops = list(base.stop_token_ids) or None
    pad = stops[0] if stops else 0
    return GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=stops, pad_token_id=pad, **sampling)


def _until_stop(ids: list[int], stops: Sequence[int]) -> list[int]:
    """The answer up to its first end token; the padding after it is removed."""
    end = next((position for position, token in enumerate(ids) if token in stops), len(ids) - 1)
    return ids[: end + 1]
