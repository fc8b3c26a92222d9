"""Greedy answers and prompt ids of mlx-lm: python mlx_answers.py JOB.json ANSWERS.json, in its own environment."""

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm import __version__, load
from mlx_lm.generate import generate_step


def answer(model: object, ids: list[int], tokens: int, stops: set[int]) -> list[int]:
    """The greedy continuation, with the token that ends it."""
    result = []
    for token, _ in generate_step(mx.array(ids), model, max_tokens=tokens):
        result.append(int(token))
        if result[-1] in stops:
            break
    return result


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    mx.set_default_device(mx.cpu)
    model, tokenizer = load(job["model"], adapter_path=job.get("adapter"))
    stops = set(job["stop_token_ids"]) if "stop_token_ids" in job else set(tokenizer.eos_token_ids)
    result = {
        "version": __version__,
        "answers": [answer(model, ids, job["tokens"], stops) for ids in job["prompts"]],
        "prompts": [
            list(tokenizer.apply_chat_template(turns, add_generation_prompt=True)) for turns in job["conversations"]
        ],
    }
    Path(sys.argv[2]).write_text(json.dumps(result))
