"""`qlora init`: a model, a card and data -> a recipe that fits, every line of it explained."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.config import parse, write
from qlora.errors import DoesNotFit, InputError
from qlora.memory.planner.memory_plan import Plan
from qlora.memory.planner.search import price
from qlora.recipe.check import machine_of
from qlora.recipe.dataset_profile import DatasetProfile, profile_dataset
from qlora.recipe.planning import Machine, plan_of
from qlora.recipe.recipe import Recipe, from_mapping
from qlora.training import Optim
from qlora.utils.atomic_files import write_text

# Rules of thumb, not laws: those of QLoRA (arXiv:2305.14314: two or three epochs) and of the peers' own templates.
GLOBAL_BATCH = (16, 8, 4)
MICRO_BATCH, MICRO_TOKENS = (8, 4, 2, 1), 8_192  # more tokens at a time hardly make a card quicker
LENGTHS = (8_192, 4_096, 2_048, 1_024, 512, 256)
FEW_STEPS = 100  # a run of fewer learns little
EPOCHS = ((1_000, 3), (10_000, 2))  # rows below, epochs
RANKS = (16, 32, 64, 128)
HELD_OUT_ROWS = 64  # at least so many, so that their loss means something
COLUMN = 38  # where a line's explanation begins


@dataclass(frozen=True)
class Asked:
    """What the user said."""

    model: str
    data: str
    gpu: str | None = None  # memory of the card, such as 24GiB; None: the card here
    ram: str | None = None
    out: str = "recipe.yaml"


@dataclass(frozen=True)
class SuggestedRecipe:
    """A recipe's text, what was seen and planned for it, and its figures for people."""

    text: str
    sight: DatasetProfile
    plan: Plan


def begin(asked: Asked) -> SuggestedRecipe:
    """The recipe. InputError if the file is there; DataError, BaseModelError; DoesNotFit if nothing fits the card."""
    if Path(asked.out).exists():
        raise InputError(f"{asked.out} is there already, and is never overwritten. Name another file with -o.")
    machine = machine_of(asked.gpu, 1, asked.ram)
    sight = profile_dataset(asked.model, asked.data)
    settings, plan = _fitted(asked, sight, machine)
    text = _text(asked, sight, settings, plan)
    return SuggestedRecipe(text, sight, plan)


def write_recipe(begun: SuggestedRecipe, out: str) -> None:
    """Put the recipe where it was asked for."""
    write_text(Path(out), begun.text)


def summary(begun: SuggestedRecipe, out: str) -> list[str]:
    """What was seen and decided, in a few lines for people."""
    sight, said = begun.sight, begun.plan.as_json()
    return [
        f"data: {_counted(sight)} rows, format {sight.format}; half of them up to {sight.length_of(0.5):,} tokens, "
        f"99 % up to {sight.length_of(0.99):,}; {sight.trained_share:.0%} of the tokens are trained",
        f"memory: {said['peak_bytes'] / 2**30:.1f} GiB predicted of {said['gpu_bytes'] / 2**30:.1f} GiB",
        f"-> {out}. Next: qlora check {out}, then qlora train {out}",
    ]


Settings = dict[str, Any]


def _fitted(asked: Asked, sight: DatasetProfile, machine: Machine) -> tuple[Settings, Plan]:
    """The settings whose rows are longest, and among their micro-batches the one that is predicted to be quickest."""
    found = None
    for length in _lengths(sight):
        settings = _settings(asked, sight, length)
        plans = [
            plan_of(_recipe(settings | {"train.micro_batch": rows}), machine)
            for rows in MICRO_BATCH
            if rows <= settings["train.global_batch"] and (rows == 1 or rows * length <= MICRO_TOKENS)
        ]
        found = plans[-1]
        fitting = [plan for plan in plans if plan.fits]
        if fitting:
            best = min(fitting, key=lambda plan: price(plan) / plan.work.micro_batch)
            return settings | {"train.micro_batch": best.work.micro_batch}, best
    raise DoesNotFit(f"memory: {found.advice if found else 'no row'}")


def _lengths(sight: DatasetProfile) -> list[int]:
    """Lengths of a row to try, longest first: what holds 99 % of the rows whole, packed ones no shorter than 1,024."""
    wanted = next((each for each in reversed(LENGTHS) if each >= sight.length_of(0.99)), LENGTHS[0])
    if sight.tokens > FEW_STEPS * GLOBAL_BATCH[0] * 2_048:
        wanted = max(wanted, 2_048)
    elif sight.tokens > FEW_STEPS * GLOBAL_BATCH[-1] * 1_024:
        wanted = max(wanted, 1_024)
    room = min(wanted, sight.context)
    return [room] + [each for each in LENGTHS if each < room]


def _settings(asked: Asked, sight: DatasetProfile, length: int) -> Settings:
    rows = sight.rows or sight.looked_at
    epochs = next((times for below, times in EPOCHS if rows < below), 1)
    packing = sight.length_of(0.5) <= length // 2
    trained_rows = sight.tokens / length if packing else rows
    batch = next((each for each in GLOBAL_BATCH if epochs * trained_rows / each >= FEW_STEPS), GLOBAL_BATCH[-1])
    steps = max(1, round(epochs * trained_rows / batch))
    rank = next((each for each in RANKS if _holds(asked, each, sight)), RANKS[-1])
    return {
        "model.name": asked.model,
        "adapter.rank": rank,
        "adapter.alpha": 2 * rank,
        "data.train": asked.data,
        "data.eval_fraction": min(0.2, max(0.02, round(HELD_OUT_ROWS / rows, 3))),
        "data.format": sight.format,
        "data.max_length": length,
        "data.packing": packing,
        "optim.learning_rate": Optim().learning_rate,
        "train.output": f"runs/{Path(asked.out).stem}",
        "train.epochs": epochs,
        "train.global_batch": batch,
        "train.eval_every": max(1, steps // 5),
        "train.save_every": max(1, steps // 5),
    }


def _holds(asked: Asked, rank: int, sight: DatasetProfile) -> bool:
    """Whether an adapter of this rank can hold what the rows bring: two bits a parameter, one a trained token.

    Schulman et al. 2025, LoRA Without Regret.
    """
    recipe = _recipe({"model.name": asked.model, "adapter.rank": rank, "data.train": asked.data})
    parameters = plan_of(recipe, Machine(2**40)).work.adapters.values
    return 2 * parameters >= sight.tokens * sight.trained_share


def _recipe(settings: Settings) -> Recipe:
    return from_mapping(_nested(settings), "init")[0]


def _nested(settings: Settings) -> dict[str, dict[str, Any]]:
    sections: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    return sections


def _text(asked: Asked, sight: DatasetProfile, settings: Settings, plan: Plan) -> str:
    """YAML with a reason behind every line."""
    card = asked.gpu or "this machine"
    head = [
        f"# {asked.model} on {card}, made by `qlora init` after a look at {asked.data}.",
        f"# Predicted peak: {plan.peak_bytes / 2**30:.1f} GiB of {plan.budget.device_bytes / 2**30:.1f} GiB;"
        " `qlora plan` says what takes it.",
        "# What is not written here has its default: `qlora recipes show reference` has every setting.",
    ]
    why = _reasons(sight, settings, plan)
    lines = []
    for section, values in _nested(settings).items():
        lines.append(f"{section}:")
        for name, value in values.items():
            lines += _line(f"  {write({name: value}).strip()}", why[f"{section}.{name}"])
    text = "\n".join([*head, *lines, ""])
    from_mapping(parse(text, "init").value)  # what was written is a recipe, or this is our mistake
    return text


def _line(written: str, reason: str) -> list[str]:
    """A setting and its reason: beside it, or above where the setting is long."""
    return [f"{written:{COLUMN}}# {reason}"] if len(written) < COLUMN - 1 else [f"  # {reason}", written]


def _reasons(sight: DatasetProfile, settings: Settings, plan: Plan) -> Mapping[str, str]:
    length, packing = settings["data.max_length"], settings["data.packing"]
    longer = float((sight.lengths > length).mean())
    holds = "holds every row whole" if not longer else f"tokens; {longer:.2%} of the rows are longer and dropped"
    held = settings["data.eval_fraction"]
    explain = {
        "model.name": "frozen in 4 bits (NF4, double quantisation)",
        "adapter.rank": f"{plan.work.adapters.values:,} weights train; see `qlora inspect` after the run",
        "adapter.alpha": "twice the rank: the update is scaled by alpha / rank",
        "data.train": "what is learnt from: `qlora preview` shows it as it is trained",
        "data.eval_fraction": f"{held:.1%} of the rows are held out: without them overfitting can't be seen",
        "data.format": "found by the columns of the first row",
        "data.max_length": holds,
        "data.packing": "short rows share a full one, kept apart by attention" if packing else "rows are long enough",
        "optim.learning_rate": "the usual one for LoRA: about ten times that of full fine-tuning",
        "train.output": "adapter, report.html, metrics and checkpoints go here",
        "train.epochs": f"times each row is seen; {_counted(sight)} rows here (rule of thumb)",
        "train.global_batch": "rows in one optimizer step; smaller gives more steps",
        "train.eval_every": "steps between evaluations: five on the way",
        "train.save_every": "steps between checkpoints: a killed run goes on from the newest",
        "train.micro_batch": "rows at a time: the predicted quickest that fits; the result does not depend on it",
    }
    return {key: explain[key] for key in settings}


def _counted(sight: DatasetProfile) -> str:
    return f"{sight.rows:,}" if sight.rows is not None else f"more than {sight.looked_at:,}"
