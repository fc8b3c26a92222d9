"""Trees against separate sequences on multi-turn reasoning data: python benchmarks/prefix_trees.py.

Conversations of four turns with thoughts under Qwen3's chat template, which strips the thoughts of the past: each
answer has a context of its own. Tokens of the whole set; forward and backward of a part of it, packed, on a small
random Llama whose query projections train. Numbers of words are drawn around medians. Writes results/prefix_trees.json.
"""

import argparse
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import trl
from harness import write
from packing import MAX_LENGTH, packed, seconds_of
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import qlora.demo
from qlora.data.conversations.encoder import Encoder
from qlora.data.prefix_tree import paths_of, split_tree
from qlora.data.types import Example, Message
from qlora.model.attention import DOCUMENT_ATTENTION
from qlora.training.loss import TokenLoss

SHAPE = {
    "hidden_size": 576, "intermediate_size": 1_536, "num_hidden_layers": 4, "num_attention_heads": 9,
    "num_key_value_heads": 3, "max_position_embeddings": 4_096,
}  # fmt: skip  # layers of SmolLM-135M
CONVERSATIONS, TURNS, TIMED = 500, 4, 8
# Median words of a question, a thought and an answer: short thoughts, and thoughts of reasoning models.
SETS = {"short thoughts": (60, 60, 80), "long thoughts": (60, 250, 80)}
WORDS = ("the", "train", "leaves", "at", "nine", "and", "takes", "four", "hours", "more", "than", "yesterday")
TEMPLATE = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
TOKENIZER = Path(qlora.demo.__file__).parent / "base"


def conversation(draw: random.Random, medians: tuple[int, int, int]) -> list[Message]:
    """The messages of a conversation of TURNS turns."""
    messages = []
    for _ in range(TURNS):
        question, thought, answer = (
            " ".join(draw.choices(WORDS, k=max(3, round(draw.lognormvariate(0, 0.4) * median)))) for median in medians
        )
        messages += [Message("user", question), Message("assistant", answer, extra={"reasoning_content": thought})]
    return messages


def encode(encoder: Encoder, medians: tuple[int, int, int]) -> list[Example]:
    """The trees of the set."""
    draw = random.Random(0)
    return [encoder.encode(f"set:{number + 1}", conversation(draw, medians)) for number in range(CONVERSATIONS)]


def race(loss: TokenLoss, trees: Sequence[Example], rounds: int) -> dict[str, Any]:
    """Seconds of both ways in turn, and the median of their ratio in the same round."""
    fitting = [part for tree in trees for part in split_tree(paths_of(tree), MAX_LENGTH)]
    rows = [path for tree in trees for path in paths_of(tree)]
    batches = {"trees": packed(fitting), "separate": packed(rows)}
    seconds: dict[str, list[float]] = {name: [] for name in batches}
    for number in range(rounds):
        for name in list(batches) if number % 2 else reversed(list(batches)):
            seconds[name].append(seconds_of(loss, batches[name])[1])
    ratios = [apart / tree for apart, tree in zip(seconds["separate"], seconds["trees"], strict=True)]
    return {"processor_seconds": seconds, "trees_are_faster_by": statistics.median(ratios)}


def main() -> None:
    """Count and time both sets and write results/prefix_trees.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.chat_template = TEMPLATE.read_text(encoding="utf-8")
    encoder, results = Encoder(tokenizer), {}
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | {"vocab_size": len(tokenizer)}))
    model.set_attn_implementation(DOCUMENT_ATTENTION)
    for name, parameter in model.named_parameters():  # gradients reach every layer, as with adapters
        parameter.requires_grad_(name.endswith("q_proj.weight"))
    loss = TokenLoss(model).train()
    for name, medians in SETS.items():
        trees = encode(encoder, medians)
        paths = [path for tree in trees for path in paths_of(tree)]
        tokens, separate = sum(map(len, trees)), sum(map(len, paths))
        assert len(paths) == CONVERSATIONS * TURNS
        timing = race(loss, trees[:TIMED], options.rounds)
        results[name] = {
            "median_words": dict(zip(("question", "thought", "answer"), medians, strict=True)),
            "answers": len(paths), "tokens_trees": tokens, "tokens_separate": separate,
            "share": tokens / separate, "timed_conversations": TIMED, **timing,
        }  # fmt: skip
        print(f"{name}: {tokens:,} of {separate:,} tokens ({tokens / separate:.0%}), "
              f"x{timing['trees_are_faster_by']:.2f} as fast")  # fmt: skip
    settings = {"shape": SHAPE, "conversations": CONVERSATIONS, "turns": TURNS, "max_length": MAX_LENGTH}
    print(write("prefix_trees", {**settings, "sets": results}))


if __name__ == "__main__":
    main()
