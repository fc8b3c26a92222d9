"""The embedded base: a tiny Llama and its tokenizer, trained from scratch on this machine, and the demo's data beside it.

    python -m qlora.demo.make_base OUT        writes OUT/base and OUT/data; a quarter of an hour on two cores

Same seed, same Python, same package versions and same kind of CPU give the same files.
"""

import json
import logging
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qlora.demo.make_tasks import Lexicon, Turn, task
from qlora.demo.make_text import documents, frequent_words, module_summaries

log = logging.getLogger(__name__)

START, USER_OR_ASSISTANT, END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# GPT-2's split into words, except that every digit is a token of its own, so that numbers can be copied.
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
IGNORED = -100


@dataclass(frozen=True)
class Plan:
    """How the base is trained."""

    seed: int = 0
    steps: int = 1600
    prose_rows: int = 8  # a step sees so many stretches of prose ...
    prose_tokens: int = 192  # ... of so many tokens each,
    tasks: int = 32  # and so many conversations
    learning_rate: float = 3e-3  # the peak; after the warm-up a cosine to a tenth of it
    warmup_steps: int = 80
    weight_decay: float = 0.05
    threads: int = 2


def train_tokenizer(texts: list[str], vocabulary: int = 2048) -> PreTrainedTokenizerFast:
    """Give a byte-level BPE tokenizer with the chat template and its control tokens."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[START, USER_OR_ASSISTANT, END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[USER_OR_ASSISTANT],
        chat_template=TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def shape(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Give the model's shape: 1.7 million parameters, every matrix a multiple of 64 wide and high."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def conversation(turn: Turn, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], int]:
    """Give the token ids of one conversation up to the end of its last turn, and how many of them are the prompt."""
    user, answer = turn
    prompt = f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    return ids + tokenizer.encode(f"{answer}<|im_end|>", add_special_tokens=False), len(ids)


def prose_batches(texts: list[str], tokenizer: PreTrainedTokenizerFast, plan: Plan) -> Iterator[Tensor]:
    """Give [B, T + 1] stretches of the documents, joined in a new order every time through."""
    random = Random(plan.seed)
    encoded = [tokenizer.encode(START + text, add_special_tokens=False) for text in texts]
    need = plan.prose_rows * plan.prose_tokens
    stream: list[int] = []
    while True:
        random.shuffle(encoded)
        stream += [token for ids in encoded for token in ids]
        while len(stream) > need:
            yield torch.tensor(stream[:need]).view(plan.prose_rows, plan.prose_tokens)
            del stream[:need]


def task_batches(tokenizer: PreTrainedTokenizerFast, lexicon: Lexicon, plan: Plan) -> Iterator[tuple[Tensor, Tensor]]:
    """Give (ids, labels), each [B, T]; only the assistant's words and the end of its turn are labelled."""
    random = Random(plan.seed + 1)
    while True:
        # Conversations of like length go together, so that little is padding.
        pool = sorted((conversation(task(random, lexicon), tokenizer) for _ in range(plan.tasks * 16)), key=lambda each: len(each[0]))
        groups = [pool[start : start + plan.tasks] for start in range(0, len(pool), plan.tasks)]
        random.shuffle(groups)
        for group in groups:
            width = max(len(ids) for ids, _ in group)
            ids = torch.full((len(group), width), tokenizer.pad_token_id)
            labels = torch.full((len(group), width), IGNORED)
            for row, (tokens, prompt) in enumerate(group):
                ids[row, : len(tokens)] = torch.tensor(tokens)
                labels[row, prompt : len(tokens)] = torch.tensor(tokens[prompt:])
            yield ids, labels


def loss_of(model: LlamaForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """Give the mean cross entropy of the labelled tokens; ids, labels [B, T]."""
    logits = model(input_ids=ids).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED)


def rate(step: int, plan: Plan) -> float:
    """Give the share of the peak learning rate at `step`: linear warm-up, then a cosine down to a tenth."""
    if step < plan.warmup_steps:
        return (step + 1) / plan.warmup_steps
    done = (step - plan.warmup_steps) / max(1, plan.steps - plan.warmup_steps)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))
