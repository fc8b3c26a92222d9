"""The embedded base: a tiny Llama and its tokenizer, trained from scratch, and the demo's data beside it.

    python -m qlora.demo.make_base OUT        writes OUT/base and OUT/data; minutes on one core

Prose comes from the documentation that every Python carries (make_text.py), conversations are made (make_tasks.py).
Same seed, same Python, same package versions and same kind of CPU give the same files.
"""

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qlora.demo import make_data
from qlora.demo.make_tasks import Turn, task
from qlora.demo.make_text import documents

START, TURN, END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# GPT-2's split into words, except that every digit is a token of its own, so that numbers can be copied.
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
IGNORED = -100


@dataclass(frozen=True)
class Plan:
    """How the base is trained."""

    seed: int = 0
    steps: int = 2800
    conversations: int = 32  # a step sees so many conversations
    prose_rows: int = 2  # and so many stretches of prose
    prose_tokens: int = 128  # of so many tokens each,
    prose_weight: float = 0.3  # which count less than the answers
    learning_rate: float = 4e-3  # the peak; after the warm-up a cosine to a twentieth of it
    warmup_steps: int = 100
    weight_decay: float = 0.05


def make(out: Path, plan: Plan) -> dict[str, float]:
    """Write OUT/base and OUT/data; returns the last losses and the seconds of training."""
    make_data.write(out / "data")
    texts, random = documents(), Random(plan.seed)
    tokenizer = train_tokenizer(texts + [" ".join(task(random)) for _ in range(6000)])
    torch.manual_seed(plan.seed)
    torch.set_flush_denormal(True)
    model = LlamaForCausalLM(shape(tokenizer))
    # A small last norm starts the logits near zero, which saves the first hundred steps.
    model.model.norm.weight.data.mul_(0.1)
    found = train(model, tokenizer, texts, plan)
    folder = out / "base"
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    GenerationConfig(pad_token_id=tokenizer.pad_token_id, **ends).save_pretrained(folder)
    return found


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str], plan: Plan
) -> dict[str, float]:
    """Train on prose and conversations together; returns the mean losses of the last 50 steps and the seconds."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=plan.weight_decay, fused=True
    )
    prose, conversations = prose_batches(texts, tokenizer, plan), conversation_batches(tokenizer, plan)
    started, losses = time.monotonic(), list[tuple[float, float]]()
    for step in range(plan.steps):
        optimizer.param_groups[0]["lr"] = plan.learning_rate * rate(step, plan)
        ids, labels = next(conversations)
        stretch = next(prose)
        answers, text = loss_of(model, ids, labels), loss_of(model, stretch, stretch)
        (answers + plan.prose_weight * text).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append((answers.item(), text.item()))
    answers_loss, prose_loss = (sum(column) / 50 for column in zip(*losses[-50:], strict=True))
    return {"answers": answers_loss, "prose": prose_loss, "seconds": time.monotonic() - started}


def train_tokenizer(texts: list[str], vocabulary: int = 2048) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the chat template and its control tokens."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytewise])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    control = [START, TURN, END, PAD]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=control, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[TURN],
        chat_template=TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def shape(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The model's shape: 0.7 million parameters, every matrix a multiple of 64 wide and high."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def tokens_of(turn: Turn, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], int]:
    """The token ids of one conversation up to the end of its last turn, and how many of them are the prompt."""
    user, answer = turn
    prompt = f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
    ids: list[int] = tokenizer.encode(prompt, add_special_tokens=False)
    return ids + tokenizer.encode(f"{answer}<|im_end|>", add_special_tokens=False), len(ids)


def prose_batches(texts: list[str], tokenizer: PreTrainedTokenizerFast, plan: Plan) -> Iterator[Tensor]:
    """Stretches of the documents [B, T], the documents in a new order every time through."""
    random = Random(plan.seed)
    encoded = [tokenizer.encode(START + text, add_special_tokens=False, verbose=False) for text in texts]
    need, stream = plan.prose_rows * plan.prose_tokens, list[int]()
    while True:
        random.shuffle(encoded)
        stream += [token for ids in encoded for token in ids]
        while len(stream) > need:
            yield torch.tensor(stream[:need]).view(plan.prose_rows, plan.prose_tokens)
            del stream[:need]


def conversation_batches(tokenizer: PreTrainedTokenizerFast, plan: Plan) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of ids and labels, each [B, T]; only the assistant's words and the end of its turn are labelled."""
    random = Random(plan.seed + 1)
    while True:
        rows = [tokens_of(task(random), tokenizer) for _ in range(plan.conversations)]
        width = max(len(ids) for ids, _ in rows)
        ids = torch.full((len(rows), width), int(tokenizer.pad_token_id))
        labels = torch.full((len(rows), width), IGNORED)
        for row, (tokens, prompt) in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            labels[row, prompt : len(tokens)] = torch.tensor(tokens[prompt:])
        yield ids, labels


def loss_of(model: LlamaForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """The mean cross entropy of the labelled tokens; ids, labels [B, T]."""
    logits = model(input_ids=ids).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED)


def rate(step: int, plan: Plan) -> float:
    """The share of the peak learning rate at `step`: linear warm-up, then a cosine down to a twentieth."""
    if step < plan.warmup_steps:
        return (step + 1) / plan.warmup_steps
    done = (step - plan.warmup_steps) / max(1, plan.steps - plan.warmup_steps)
    return 0.05 + 0.475 * (1 + math.cos(math.pi * done))


if __name__ == "__main__":
    measured = make(Path(sys.argv[1]), Plan())
    sys.stderr.write(", ".join(f"{name} {value:.3f}" for name, value in measured.items()) + "\n")
