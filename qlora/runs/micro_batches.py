"""How many rows at a time each process takes: the recipe's number, fewer on a card that holds fewer."""

from dataclasses import dataclass

import torch

from qlora.distributed.processes import Processes
from qlora.errors import BaseModelError
from qlora.recipe.planning import plan_under
from qlora.recipe.recipe import Recipe


@dataclass(frozen=True)
class Portions:
    """Rows of a micro-batch by process, and which process this is."""

    sizes: tuple[int, ...]
    rank: int = 0

    @property
    def own(self) -> int:
        """Rows of this process's micro-batches."""
        return self.sizes[self.rank]

    def __str__(self) -> str:
        return f"micro-batches of {', '.join(map(str, self.sizes))} rows: some cards hold fewer, and take fewer rows"


def portions_of(recipe: Recipe, processes: Processes) -> Portions:
    """The recipe's micro-batch for all, unless a process's card holds only a smaller one while another's holds it.

    Where no card holds it, or one holds none at all, it stays: the plan then says what would fit.
    """
    wanted, world = recipe.train.micro_batch, processes.world
    alike = Portions((wanted,) * world, processes.rank)
    if world == 1 or wanted == 1:
        return alike
    places = torch.zeros(world, dtype=torch.long, device=processes.device)
    places[processes.rank] = largest_that_fits(recipe, processes)
    found = tuple(int(size) for size in processes.sum(places))
    return alike if max(found) < wanted or min(found) == 0 else Portions(found, processes.rank)


def largest_that_fits(recipe: Recipe, processes: Processes) -> int:
    """Rows of the largest micro-batch, up to the recipe's, that this process's card holds; 0 for none.

    The recipe's own for a model whose shapes the planner does not know.
    """
    size = recipe.train.micro_batch
    try:
        while size and not plan_under(of_size(recipe, size), processes.world, strategy_of(processes)).fits:
            size //= 2
    except BaseModelError:
        return recipe.train.micro_batch
    return size


def of_size(recipe: Recipe, size: int) -> Recipe:
    """The recipe with another micro-batch."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"micro_batch": size})})


def strategy_of(processes: Processes) -> str | None:
    """The strategy that a plan is made for; None leaves it to the recipe."""
    return "fsdp" if processes.shards else None
