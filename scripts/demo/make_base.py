"""The embedded base: a tiny Llama and its tokenizer, trained from scratch, and the demo's data beside it.

    python scripts/demo/make_base.py OUT        writes OUT/base and OUT/data; about ten minutes of one core

It learns to copy from repeated random tokens, then to read from the documentation that every Python carries
(make_text.py) and to converse from generated conversations (make_tasks.py).
Same seed, same Python, same package versions and same kind of CPU give the same files.
"""

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import make_batches
import make_card
import make_data
import torch
from make_batches import IGNORED, Batch
from make_model import train_tokenizer, untrained
from make_tasks import Lexicon, task
from make_text import documents, frequent_words, module_summaries
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 0
THREADS = 1  # another number sums in another order, and gives other weights
FREQUENT_WORDS = 1500
PEAK_RATE, WEIGHT_DECAY, BETAS, LARGEST_GRADIENT = 3e-3, 0.05, (0.9, 0.98), 1.0
SHOWN_EVERY = 50  # steps; also how many steps a reported loss is the mean of


@dataclass(frozen=True)
class Phase:
    """A stretch of the training with its learning rate: linear warm-up, then a cosine down to `floor`."""

    name: str
    steps: int
    warmup_steps: int
    floor: float  # share of the peak that is left at the end
    embedding_factor: float  # the embeddings' rate over that of the other weights

    def rate(self, step: int) -> float:
        """The share of the peak learning rate at `step`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done))


COPY = Phase("copy", steps=400, warmup_steps=50, floor=1.0, embedding_factor=1.0)
# Embeddings are large (make_model.py), so they need larger steps once they are to mean something.
READ = Phase("prose, conversations", steps=1500, warmup_steps=80, floor=0.1, embedding_factor=10.0)


def make(out: Path) -> None:
    """Write OUT/base and OUT/data, and the losses to stderr on the way."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(SEED)
    texts, random = documents(), Random(SEED)
    lexicon = Lexicon(frequent_words(texts, FREQUENT_WORDS), module_summaries())
    tokenizer = train_tokenizer([*texts, *(" ".join(task(random, lexicon)) for _ in range(5000))])
    model, started = untrained(tokenizer), time.monotonic()
    copies = make_batches.copies(8, 96, len(tokenizer), SEED)
    losses = train(model, ((batch,) for batch in copies), COPY)
    prose = make_batches.prose(4, 192, texts, tokenizer, SEED)
    conversations = make_batches.conversations(16, lexicon, tokenizer, SEED + 1)
    losses += train(model, zip(prose, conversations, strict=True), READ)
    seconds = time.monotonic() - started
    save(out / "base", model, tokenizer)
    make_card.write(out / "base", (COPY.steps, READ.steps), losses, seconds)
    make_data.write(out / "data")


def train(model: LlamaForCausalLM, groups: Iterator[tuple[Batch, ...]], phase: Phase) -> list[float]:
    """Take a step on the sum of the mean losses of every group's batches; returns the last mean of each loss."""
    embeddings = model.model.embed_tokens.weight
    others = [each for each in model.parameters() if each is not embeddings]
    settings = [{"params": others, "factor": 1.0}, {"params": [embeddings], "factor": phase.embedding_factor}]
    optimizer = torch.optim.AdamW(settings, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)
    seen: list[list[float]] = []
    for step in range(phase.steps):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * group["factor"] * phase.rate(step)
        losses = [loss_of(model, *batch) for batch in next(groups)]
        torch.stack(losses).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), LARGEST_GRADIENT)
        optimizer.step()
        optimizer.zero_grad()
        seen.append([loss.item() for loss in losses])
        if (step + 1) % SHOWN_EVERY == 0:
            sys.stderr.write(f"{phase.name}: step {step + 1} of {phase.steps}, loss {last_means(seen)}\n")
    return last_means(seen)


def last_means(seen: list[list[float]]) -> list[float]:
    """The mean of each loss over the last steps, to three places."""
    recent = seen[-SHOWN_EVERY:]
    return [round(sum(column) / len(recent), 3) for column in zip(*recent, strict=True)]


def loss_of(model: LlamaForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """The mean cross entropy of the labelled tokens; ids, labels [B, T]."""
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
    labelled = labels[:, 1:] != IGNORED
    return cross_entropy(model.lm_head(hidden[labelled]), labels[:, 1:][labelled])


def save(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write the folder that AutoModelForCausalLM and AutoTokenizer read, the weights in bfloat16."""
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    GenerationConfig(pad_token_id=tokenizer.pad_token_id, **ends).save_pretrained(folder)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
