"""Memory probe: the longest micro-batch of a run, forward and backward, before the first step; it changes nothing.

A run that would exceed the memory at step 10,000 exceeds it here, where OomRecovery can reduce its memory use.
"""

from collections.abc import Callable, Sequence

import torch

from qlora.data.batching.collate import Batch, collate
from qlora.data.batching.sampler import lengths_of
from qlora.data.types import Example
from qlora.training.job import Job
from qlora.training.loop import backward


def probe_memory(job: Job, moment_bytes: int) -> None:
    """Run the longest micro-batch while `moment_bytes`, those of the optimizer state to come, are allocated too."""
    batch = longest_batch(job.train_examples, job.micro_batch_sizes[job.processes.rank], job.collate)
    batch = batch.to(job.processes.device)
    with job.processes.accumulating(job.model, last=False):
        reserved = torch.empty(moment_bytes, dtype=torch.uint8, device=batch.input_ids.device)
        with torch.random.fork_rng(devices=[]):
            job.oom_recovery.run(lambda: backward(job, batch, batch.counts))
        del reserved
        job.oom_recovery.drop_gradients()


def longest_batch(
    sequences: Sequence[Example], micro_batch: int, collate: Callable[[Sequence[Example], int], Batch] = collate
) -> Batch:
    """A micro-batch of the longest sequences: no micro-batch of the run is larger."""
    order = lengths_of(sequences).argsort(kind="stable")[::-1]
    return collate([sequences[int(index)] for index in order[:micro_batch]], 0)
