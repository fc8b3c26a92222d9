"""The embedded base model: a tiny Llama and its tokenizer, trained from scratch, and the data of the demo.

    python scripts/demo/make_base.py OUT        writes OUT/base and OUT/data; about ten minutes of one core

First phase: copying, on repeated random tokens. Second phase: prose, on the documentation in the Python standard
library (make_text.py), and generated conversations (make_tasks.py).
The same seed, Python, package versions and kind of CPU give the same files.
"""

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import make_batches
import make_data
import make_model_card
import torch
from make_batches import IGNORED, Batch
from make_model import train_tokenizer, untrained_model
from make_tasks import Lexicon, make_task
from make_text import documents, frequent_words, module_summaries
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 0
THREADS = 1  # another number changes the order of sums, and so the weights
FREQUENT_WORDS = 1500
PEAK_RATE, WEIGHT_DECAY, BETAS, MAX_GRADIENT_NORM = 3e-3, 0.05, (0.9, 0.98), 1.0
LOG_STEPS = 50  # a loss is printed after so many steps, as their mean


@dataclass(frozen=True)
class Phase:
    """A phase of the training with its learning rate: linear warm-up, then a cosine down to `end_rate`."""

    name: str
    steps: int
    warmup_steps: int
    end_rate: float  # share of the peak learning rate at the end
    embedding_factor: float  # learning rate of the embeddings over that of the other weights

    def rate(self, step: int) -> float:
        """The share of the peak learning rate at `step`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.end_rate + (1 - self.end_rate) * 0.5 * (1 + math.cos(math.pi * progress))


COPY = Phase("copy", steps=400, warmup_steps=50, end_rate=1.0, embedding_factor=1.0)
# Embeddings are large (make_model.py), so they need larger steps to learn meanings.
READ = Phase("prose, conversations", steps=1500, warmup_steps=80, end_rate=0.1, embedding_factor=10.0)


def make(out: Path) -> None:
    """Write OUT/base and OUT/data; print the losses on stderr."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(SEED)
    texts, random = documents(), Random(SEED)
    lexicon = Lexicon(frequent_words(texts, FREQUENT_WORDS), module_summaries())
    tokenizer = train_tokenizer([*texts, *(" ".join(make_task(random, lexicon)) for _ in range(5000))])
    model, started = untrained_model(tokenizer), time.monotonic()
    copies = make_batches.copies(8, 96, len(tokenizer), SEED)
    losses = train(model, ((batch,) for batch in copies), COPY)
    prose = make_batches.prose(4, 192, texts, tokenizer, SEED)
    conversations = make_batches.conversations(16, lexicon, tokenizer, SEED + 1)
    losses += train(model, zip(prose, conversations, strict=True), READ)
    seconds = time.monotonic() - started
    save(out / "base", model, tokenizer)
    make_model_card.write(out / "base", (COPY.steps, READ.steps), losses, seconds)
    make_data.write(out / "data")


def train(model: LlamaForCausalLM, groups: Iterator[tuple[Batch, ...]], phase: Phase) -> list[float]:
    """Train one step on each group: the sum of its batches' mean losses. Returns the last mean of each loss."""
    embeddings = model.model.embed_tokens.weight
    others = [parameter for parameter in model.parameters() if parameter is not embeddings]
    settings = [{"params": others, "factor": 1.0}, {"params": [embeddings], "factor": phase.embedding_factor}]
    optimizer = torch.optim.AdamW(settings, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)
    history: list[list[float]] = []
    for step in range(phase.steps):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * group["factor"] * phase.rate(step)
        losses = [loss_of(model, *batch) for batch in next(groups)]
        torch.stack(losses).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad()
        history.append([loss.item() for loss in losses])
        if (step + 1) % LOG_STEPS == 0:
            sys.stderr.write(f"{phase.name}: step {step + 1} of {phase.steps}, loss {last_means(history)}\n")
    return last_means(history)


def last_means(history: list[list[float]]) -> list[float]:
    """The mean of each loss over the last steps, to three decimals."""
    recent = history[-LOG_STEPS:]
    return [round(sum(column) / len(recent), 3) for column in zip(*recent, strict=True)]


def loss_of(model: LlamaForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """The mean cross entropy of the labeled tokens; ids, labels [B, T]."""
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
    labeled = labels[:, 1:] != IGNORED
    return cross_entropy(model.lm_head(hidden[labeled]), labels[:, 1:][labeled])


def save(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write the folder that AutoModelForCausalLM and AutoTokenizer read, the weights in bfloat16."""
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    special_ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    GenerationConfig(pad_token_id=tokenizer.pad_token_id, **special_ids).save_pretrained(folder)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
