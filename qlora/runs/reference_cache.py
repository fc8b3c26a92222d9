"""Log-probabilities under the reference, computed once and kept beside the prepared data, where they are used twice.

A file holds a JSON line, with the fingerprint of all that the values depend on and their digest, then the values in
float32. One whose fingerprint or digest is another is not used.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from qlora._version import __version__
from qlora.adapters.adapter_folder import WEIGHTS
from qlora.data.batching.sampler import steps_per_epoch
from qlora.data.compared import ReferencedAnswers, Values
from qlora.data.types import Example, count_of
from qlora.errors import QloraError
from qlora.model.lm_head import shares_prefixes
from qlora.runs.write_artifacts import RunSetup
from qlora.training.job import Job
from qlora.training.objectives import OBJECTIVES
from qlora.training.objectives.reference_values import reference_values
from qlora.utils.atomic_files import cache_folder, sha256_of, write_bytes

SUFFIX = "-reference"  # after the digest of the fingerprint; the cache of prepared data removes old files


def with_references(setup: RunSetup, job: Job) -> Job:
    """The job with the reference's values of its examples, for those that the run would give to the reference twice.

    Training examples: if the run has more than one epoch. Held-out ones: always, at step 0 and at the end.
    """
    step = job.comparison
    if step is None or not step.objective.needs_reference:
        return job
    if job.total_steps > steps_per_epoch(len(job.train_examples), job.settings.global_batch):
        job = replace(job, train_examples=_referenced(setup, job, "train", job.train_examples))
    if len(job.eval_examples):
        job = replace(job, eval_examples=_referenced(setup, job, "eval", job.eval_examples))
    return job


def _referenced(setup: RunSetup, job: Job, part: str, examples: Sequence[Example]) -> Sequence[Example]:
    """Examples with values from the cache, or computed on all ranks and then kept."""
    identity = fingerprint(setup, part)
    text = json.dumps(identity, sort_keys=True)
    folder, name = cache_folder("data"), hashlib.sha256(text.encode()).hexdigest() + SUFFIX
    values, problem = read_values(folder / name, identity) if folder else (None, "")
    if problem:
        job.log.print(f"{folder / name if folder else name}: {problem}; computed again")
    if setup.processes.any(values is None):  # every rank computes its part, also where one machine has the file
        assert job.comparison is not None
        progress = job.log.progress("computing the reference")
        values = reference_values(job.comparison, examples, min(job.micro_batch_sizes), setup.processes, progress)
        kept = write_values(folder / name, identity, values) if folder and setup.processes.writes else ""
        job.log.print(f"reference: {count_of(len(values), 'answer')} of data.{part} computed once{kept}")
    else:
        job.log.print(f"reference: the values of data.{part} were computed before, read from {folder}")
    assert values is not None
    return ReferencedAnswers(examples, values)


def fingerprint(setup: RunSetup, part: str) -> dict[str, Any]:
    """All that the values of data.`part` depend on: base, reference, template, rows, and how they are computed."""
    recipe, base = setup.recipe, setup.base
    reference = Path(recipe.objective.reference).expanduser() / WEIGHTS
    kl_group = recipe.train.global_batch if OBJECTIVES[recipe.objective.kind].needs_kl else None
    return {
        "base": [base.manifest.sha256, base.manifest.dtype, recipe.quant.model_dump(mode="json")],
        "reference": sha256_of(reference) if reference.is_file() else "base",
        "template": setup.encoder.sha256,
        "rows": [part, setup.data.report.sha256, recipe.train.seed, recipe.data.model_dump(mode="json")],
        "examples": [recipe.objective.sided_format, kl_group, shares_prefixes(base.model)],
        "computed": [__version__, base.device.type, recipe.model.attention],
    }


def read_values(path: Path, identity: dict[str, Any]) -> tuple[Values | None, str]:
    """The values in a file; None and why, if they are of something else or damaged; None and "" without a file."""
    try:
        content = path.read_bytes()
    except OSError:
        return None, ""
    line, _, body = content.partition(b"\n")
    try:
        header = json.loads(line)
        other = sorted(key for key in identity if header["fingerprint"].get(key) != identity[key])
        if other:
            return None, f"computed for another {' and '.join(other)}"
        if header["sha256"] != hashlib.sha256(body).hexdigest():
            return None, "damaged"
    except (ValueError, KeyError, TypeError, AttributeError):
        return None, "damaged"
    with suppress(OSError):
        os.utime(path)
    return np.frombuffer(body, dtype="<f4"), ""


def write_values(path: Path, identity: dict[str, Any], values: Values) -> str:
    """Keep the values; where they are kept, as the end of a line for the user."""
    body = values.astype("<f4").tobytes()
    header = {"fingerprint": identity, "sha256": hashlib.sha256(body).hexdigest()}
    try:
        write_bytes(path, json.dumps(header).encode() + b"\n" + body)
    except QloraError as error:
        return f", and not kept: {error}"
    return f", and kept in {path.parent}"
