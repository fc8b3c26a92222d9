"""llama.cpp by cyllama: greedy answers to prompts given as ids. Arguments: job.json, answers.json.

Keys and values are cached in float32, as the run computes them; llama.cpp's default is float16.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

from cyllama.llama import llama_cpp

CONTEXT, FLOAT32 = 512, 0  # tokens; GGML's number of the type


def answer(context: llama_cpp.LlamaContext, prompt: list[int], tokens: int, stops: list[int]) -> list[int]:
    context.kv_cache_clear()
    ids: list[int] = []
    past, new = 0, prompt
    while len(ids) < tokens:
        batch = llama_cpp.LlamaBatch(n_tokens=CONTEXT, embd=0, n_seq_max=1)
        batch.set_batch(new, past, False)
        batch.set_last_logits_to_true()
        context.decode(batch)
        past += len(new)
        logits = context.get_logits_ith(-1)
        new = [max(range(len(logits)), key=logits.__getitem__)]
        ids += new
        if new[0] in stops:
            break
    return ids


def main(job_file: str, answers_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    parameters = llama_cpp.LlamaModelParams()
    parameters.n_gpu_layers = 0
    model = llama_cpp.LlamaModel(job["model"], parameters, False)
    settings = llama_cpp.LlamaContextParams()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = CONTEXT
    settings.type_k = settings.type_v = FLOAT32
    settings.flash_attn_type = 0
    context = llama_cpp.LlamaContext(model, settings, False)
    if job.get("adapter"):
        context.set_adapters_lora([(model.lora_adapter_init(job["adapter"]), 1.0)])
    vocabulary = model.get_vocab()
    stops = [token for token in range(vocabulary.n_vocab) if vocabulary.is_eog(token)]
    answers = [answer(context, prompt, job["tokens"], stops) for prompt in job["prompts"]]
    texts = [list(vocabulary.tokenize(text, True, True)) for text in job["texts"]]
    content = {"version": f"cyllama {version('cyllama')}", "answers": answers, "prompts": texts}
    Path(answers_file).write_text(json.dumps(content))


if __name__ == "__main__":
    main(*sys.argv[1:])
