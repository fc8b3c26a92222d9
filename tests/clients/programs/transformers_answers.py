"""Greedy answers and prompt ids of transformers and PEFT: python transformers_answers.py JOB.json ANSWERS.json."""

import json
import sys
from pathlib import Path

import torch
import transformers


def answer(model: object, ids: list[int], tokens: int, stops: list[int]) -> list[int]:
    """The greedy continuation, with the token that ends it."""
    inputs = torch.tensor([ids])
    options = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": stops, "pad_token_id": 0}
    output = model.generate(inputs, attention_mask=torch.ones_like(inputs), **options)
    return [int(token) for token in output[0, len(ids) :]]


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(job["model"], torch_dtype=torch.float32).eval()
    version = transformers.__version__
    if "adapter" in job:
        import peft

        model, version = peft.PeftModel.from_pretrained(model, job["adapter"]), f"{version}, PEFT {peft.__version__}"
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.get("adapter", job["model"]))
    stops = job.get("stop_token_ids") or model.generation_config.eos_token_id
    result = {
        "version": version,
        "answers": [answer(model, ids, job["tokens"], stops) for ids in job["prompts"]],
        "prompts": [
            list(tokenizer.apply_chat_template(turns, add_generation_prompt=True)) for turns in job["conversations"]
        ],
    }
    Path(sys.argv[2]).write_text(json.dumps(result))
