"""`qlora init`: a recipe for a model, a GPU and a data set that fits, with an explanation of every line."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.config import parse, write
from qlora.errors import DoesNotFit
from qlora.memory.planner.memory_plan import Plan
from qlora.memory.planner.search import estimated_cost
from qlora.recipe.dataset_profile import DatasetProfile, profile_dataset
from qlora.recipe.literature import BITS_PER_PARAMETER, BITS_PER_TOKEN, REGRET, holds, suggest_rate
from qlora.recipe.plan_recipe import requested_machine
from qlora.recipe.planning import Machine, Planner
from qlora.recipe.recipe import Recipe, from_mapping
from qlora.utils.atomic_files import write_text
from qlora.utils.machine import gib

# Rules of thumb: those of QLoRA (arXiv:2305.14314: two or three epochs) and of other trainers' templates.
GLOBAL_BATCH = (16, 8, 4)
MICRO_BATCH, MICRO_TOKENS = (8, 4, 2, 1), 8_192  # more tokens at a time hardly increase a GPU's throughput
LENGTHS = (8_192, 4_096, 2_048, 1_024, 512, 256)
FEW_STEPS = 100  # a run with fewer steps learns little
EPOCHS = ((1_000, 3), (10_000, 2))  # (fewer records than this, epochs)
RANKS = (16, 32, 64, 128)
HELD_OUT_RECORDS = 64  # at least, so that the held-out loss means something
COLUMN = 38  # of the explanations


@dataclass(frozen=True)
class InitRequest:
    """The options of `qlora init`."""

    model: str
    data: str
    gpu: str | None = None  # memory of the GPU, such as 24GiB; None: the GPU of this machine
    ram: str | None = None
    out: str = "recipe.yaml"


@dataclass(frozen=True)
class SuggestedRecipe:
    """The text of a recipe, the data set's profile and the memory plan."""

    text: str
    profile: DatasetProfile
    plan: Plan


def suggest_recipe(request: InitRequest) -> SuggestedRecipe:
    """The recipe. DataError, BaseModelError; DoesNotFit if nothing fits the GPU."""
    machine = requested_machine(request.gpu, 1, request.ram)
    profile = profile_dataset(request.model, request.data)
    settings, plan = _fit(request, profile, machine)
    text = _write_yaml(request, profile, settings, plan)
    return SuggestedRecipe(text, profile, plan)


def write_recipe(suggestion: SuggestedRecipe, out: str) -> None:
    """Write the recipe to a file."""
    write_text(Path(out), suggestion.text)


def summary(suggestion: SuggestedRecipe, out: str) -> list[str]:
    """What was measured and decided, in a few lines."""
    profile, plan = suggestion.profile, suggestion.plan.as_json()
    return [
        f"data: {_count(profile)} records, format {profile.format}; half of them up to "
        f"{profile.length_quantile(0.5):,} tokens, 99 % up to {profile.length_quantile(0.99):,}; "
        f"{profile.trained_share:.0%} of the tokens are trained",
        f"memory: {gib(plan['peak_bytes'])} predicted of {gib(plan['gpu_bytes'])}",
        f"-> {out}. Next: qlora check {out}, then qlora train {out}",
    ]


Settings = dict[str, Any]


def _fit(request: InitRequest, profile: DatasetProfile, machine: Machine) -> tuple[Settings, Plan]:
    """The settings with the longest sequences that fit, and the micro-batch that is predicted to be fastest."""
    plan = None
    for length in _candidate_lengths(profile):
        settings = _settings(request, profile, length)
        plans = [
            Planner(_recipe(settings | {"train.micro_batch": size})).plan(machine)
            for size in MICRO_BATCH
            if size <= settings["train.global_batch"] and (size == 1 or size * length <= MICRO_TOKENS)
        ]
        plan = plans[-1]
        fitting = [candidate for candidate in plans if candidate.fits]
        if fitting:
            best = min(fitting, key=lambda candidate: estimated_cost(candidate) / candidate.work.micro_batch)
            return settings | {"train.micro_batch": best.work.micro_batch}, best
    raise DoesNotFit(f"memory: {plan.advice if plan else 'no sequence length fits'}")


def _candidate_lengths(profile: DatasetProfile) -> list[int]:
    """Values of max_length to try, longest first: one that holds 99 % of the examples; for packing at least 1,024."""
    longest = next((length for length in reversed(LENGTHS) if length >= profile.length_quantile(0.99)), LENGTHS[0])
    if profile.tokens > FEW_STEPS * GLOBAL_BATCH[0] * 2_048:
        longest = max(longest, 2_048)
    elif profile.tokens > FEW_STEPS * GLOBAL_BATCH[-1] * 1_024:
        longest = max(longest, 1_024)
    longest = min(longest, profile.context)
    return [longest] + [length for length in LENGTHS if length < longest]


def _settings(request: InitRequest, profile: DatasetProfile, length: int) -> Settings:
    records = profile.records or profile.sampled
    epochs = next((epochs for limit, epochs in EPOCHS if records < limit), 1)
    packing = profile.length_quantile(0.5) <= length // 2
    sequences = profile.tokens / length if packing or profile.format == "text" else records
    batch = next((size for size in GLOBAL_BATCH if epochs * sequences / size >= FEW_STEPS), GLOBAL_BATCH[-1])
    steps = max(1, round(epochs * sequences / batch))
    rank = next((rank for rank in RANKS if _has_capacity(request, rank, profile)), RANKS[-1])
    return {
        "model.name": request.model,
        "adapter.rank": rank,
        "adapter.alpha": 2 * rank,
        "data.train": request.data,
        "data.eval_fraction": min(0.2, max(0.02, round(HELD_OUT_RECORDS / records, 3))),
        "data.format": profile.format,
        "data.max_length": length,
        "data.packing": packing,
        "optim.learning_rate": suggest_rate(_recipe({"model.name": request.model, "data.train": request.data})).rate,
        "train.output": f"runs/{Path(request.out).stem}",
        "train.epochs": epochs,
        "train.global_batch": batch,
        "train.eval_every": max(1, steps // 5),
        "train.save_every": max(1, steps // 5),
    }


def _has_capacity(request: InitRequest, rank: int, profile: DatasetProfile) -> bool:
    """Whether an adapter of this rank can hold the trained tokens."""
    recipe = _recipe({"model.name": request.model, "adapter.rank": rank, "data.train": request.data})
    parameters = Planner(recipe).plan(Machine(2**40)).work.adapters.values
    return holds(parameters, profile.tokens * profile.trained_share)


def _recipe(settings: Settings) -> Recipe:
    return from_mapping(_nested(settings), "init")[0]


def _nested(settings: Settings) -> dict[str, dict[str, Any]]:
    sections: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    return sections


def _write_yaml(request: InitRequest, profile: DatasetProfile, settings: Settings, plan: Plan) -> str:
    """YAML with a comment on every line."""
    gpu = request.gpu or "this machine"
    lines = [
        f"# {request.model} on {gpu}, written by `qlora init` for {request.data}.",
        f"# Predicted peak: {gib(plan.peak_bytes)} of {gib(plan.budget.device_bytes)}; `qlora plan` has the parts.",
        "# Settings that are not here have their defaults: `qlora recipes show reference` lists all settings.",
    ]
    comments = _comments(profile, settings, plan)
    for section, values in _nested(settings).items():
        lines.append(f"{section}:")
        for name, value in values.items():
            lines += _commented(f"  {write({name: value}).strip()}", comments[f"{section}.{name}"])
    text = "\n".join([*lines, ""])
    from_mapping(parse(text, "init").value)  # fails if the text is not a valid recipe, which would be a bug here
    return text


def _commented(line: str, comment: str) -> list[str]:
    """A setting with its comment: on the same line, or above a long setting."""
    return [f"{line:{COLUMN}}# {comment}"] if len(line) < COLUMN - 1 else [f"  # {comment}", line]


def _comments(profile: DatasetProfile, settings: Settings, plan: Plan) -> Mapping[str, str]:
    length, packing = settings["data.max_length"], settings["data.packing"]
    overlong = float((profile.lengths > length).mean())
    fate = "split into pieces" if profile.format == "text" else "dropped"
    fraction = settings["data.eval_fraction"]
    comments = {
        "model.name": "frozen in 4 bits (NF4, double quantization)",
        "adapter.rank": _rank_reason(profile, plan),
        "adapter.alpha": "twice the rank: the update is scaled by alpha / rank",
        "data.train": "the training data: `qlora preview` shows it as it is trained",
        "data.eval_fraction": f"{fraction:.1%} of the examples are held out, to measure overfitting",
        "data.format": "detected from the fields of the first record",
        "data.max_length": f"tokens; {overlong:.2%} of the examples are longer and {fate}"
        if overlong
        else "tokens; no example is longer",
        "data.packing": "short examples share a sequence, separated by the attention mask"
        if packing
        else "the examples are long enough",
        "optim.learning_rate": _rate_reason(settings),
        "train.output": "adapter, report.html, metrics and checkpoints are written here",
        "train.epochs": f"for {_count(profile)} records (rule of thumb)",
        "train.global_batch": "sequences in one optimizer step; a smaller one gives more steps",
        "train.eval_every": "steps between evaluations: five during the run",
        "train.save_every": "steps between checkpoints: an interrupted run resumes from the newest",
        "train.micro_batch": "sequences at a time: predicted to be fastest; it does not change the result",
    }
    return {key: comments[key] for key in settings}


def _rank_reason(profile: DatasetProfile, plan: Plan) -> str:
    """Why this rank: what the data bring against what the adapter holds."""
    parameters, tokens = plan.work.adapters.values, profile.tokens * profile.trained_share
    relation = "hold" if holds(parameters, tokens) else "hold a part of"
    return (
        f"{parameters:,} weights of about {BITS_PER_PARAMETER} bits {relation} {tokens:,.0f} trained tokens of about "
        f"{BITS_PER_TOKEN} bit ({REGRET}); `qlora inspect` after the run says whether a lower rank is enough"
    )


def _rate_reason(settings: Settings) -> str:
    """Where the learning rate comes from, and whether that source measured models of this size."""
    model = {key: settings[key] for key in ("model.name", "data.train")}
    suggestion = suggest_rate(_recipe(model))
    size = "" if suggestion.fitted else ", which measured larger models"
    return f"{suggestion.source}{size}; `qlora sweep RECIPE --find-lr` measures it here"


def _count(profile: DatasetProfile) -> str:
    return f"{profile.records:,}" if profile.records is not None else f"more than {profile.sampled:,}"
