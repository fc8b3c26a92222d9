"""What the literature recommends for a low-rank adapter, each with its source. The only place of these figures.

`init`, `check`, `advise` and `sweep --find-lr` read it. Sources:

- QLoRA: Dettmers et al. 2023, arXiv:2305.14314 (all linear layers; 2e-4, 1e-4 from 33B on; dropout helps below 33B)
- LoRA Without Regret: Schulman et al. 2025, thinkingmachines.ai/blog/lora (ten times the rate of full fine-tuning,
  nearly independent of the rank; small batches; two bits a parameter; attention alone loses at any rank)
- tinker-cookbook, `hyperparam_utils.py` (the rate by family and hidden size, fitted on Llama and Qwen models)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

from qlora.errors import QloraError
from qlora.model.download import find_config
from qlora.recipe.recipe import Recipe
from qlora.training import Optim
from qlora.utils.atomic_files import read_json

QLORA, REGRET = "QLoRA, arXiv:2305.14314", "LoRA Without Regret, Schulman et al. 2025"
TINKER = "tinker-cookbook: 10 x 5e-5 x (2000 / hidden size)^e"
FULL_RATE, LORA_FACTOR, REFERENCE_HIDDEN = 5e-5, 10, 2_000  # of full fine-tuning, and what LoRA takes of it
EXPONENTS = {"llama": 0.781, "mistral": 0.781, "qwen": 0.0775}  # of (2000 / hidden), by the start of model_type
LARGE_HIDDEN, LARGE_RATE = 6_144, 1e-4  # 33B and larger; below, the default of optim.learning_rate
COMPARED_RATE, COMPARED_RATES = 1.5e-5, (5e-6, 5e-5)  # objectives that compare answers: the middle, and the range
OTHER_RATE = 4.0  # times the suggested rate, or a fraction of it: worth a word
FITTED_HIDDEN = 1_024  # the rates by family were fitted on models of 1B and more
LARGEST_BATCH = 32  # sequences of a step; LoRA pays for larger ones with loss
BITS_PER_PARAMETER, BITS_PER_TOKEN = 2, 1  # of an adapter; of a trained token
LARGEST_RANK = 256  # as good as full fine-tuning on data sets for fine-tuning: LoRA Without Regret
SMALL_SET, EPOCHS_OF_SMALL_SET = 1_000, 3  # records; passes after which fine-tunes mostly memorize them


@dataclass(frozen=True)
class SuggestedRate:
    """A learning rate and its source."""

    rate: float
    source: str
    fitted: bool = True  # whether models of this size are among those that the source measured


def suggest_rate(recipe: Recipe) -> SuggestedRate:
    """The learning rate for the objective, and for the family and size of the base model, rounded to two digits."""
    if recipe.objective.sided_format is not None:
        low, high = COMPARED_RATES
        return SuggestedRate(COMPARED_RATE, f"{low:g} to {high:g} are usual for objective.kind {recipe.objective.kind}")
    family, hidden = _family_and_size(recipe)
    return rate_of(family, hidden)


def rate_of(family: str, hidden: int) -> SuggestedRate:
    """The rate of supervised fine-tuning; `hidden` 0: not known."""
    exponent = next((value for name, value in EXPONENTS.items() if family.startswith(name)), None)
    if exponent is not None and hidden:
        rate = LORA_FACTOR * FULL_RATE * (REFERENCE_HIDDEN / hidden) ** exponent
        return SuggestedRate(float(f"{rate:.1e}"), TINKER, hidden >= FITTED_HIDDEN)
    return SuggestedRate(
        LARGE_RATE if hidden >= LARGE_HIDDEN else Optim().learning_rate, QLORA, hidden >= FITTED_HIDDEN
    )


def holds(parameters: int, trained_tokens: float) -> bool:
    """Whether an adapter of so many parameters can hold what the trained tokens bring, in bits."""
    return BITS_PER_PARAMETER * parameters >= BITS_PER_TOKEN * trained_tokens


def rank_that_holds(rank: int, parameters: int, trained_tokens: float) -> int:
    """The lowest rank of an adapter that can hold them, given its number of parameters at one rank."""
    return ceil(rank * BITS_PER_TOKEN * trained_tokens / (BITS_PER_PARAMETER * parameters))


def _family_and_size(recipe: Recipe) -> tuple[str, int]:
    try:
        config: Mapping[str, Any] = read_json(find_config(recipe.model.name, recipe.model.revision))
    except (QloraError, OSError, ValueError):
        return "", 0
    text = config.get("text_config")
    text = text if isinstance(text, Mapping) else config
    family, hidden = text.get("model_type") or config.get("model_type"), text.get("hidden_size")
    return str(family or ""), hidden if isinstance(hidden, int) and hidden > 0 else 0
