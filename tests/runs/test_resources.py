"""What a run gets is resolved once: config.json is read once, however many plans the ranks compare."""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.child_processes import Notify
from support.rank_processes import ranks
from support.small_runs import recipe_of, write_records

from qlora.runs.resources import resolve_resources

opened: Counter[str] = Counter()


def count_opened(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: counts the files that this process opens, by name."""
    if event == "open" and isinstance(arguments[0], str | Path):
        opened[Path(arguments[0]).name] += 1


@pytest.mark.parametrize(("world_size", "kind"), [(1, "auto"), (2, "auto"), (2, "ddp")])
def test_config_json_is_read_once_for_all_plans(
    zoo: Callable[..., Path], tmp_path: Path, world_size: int, kind: str
) -> None:
    data = write_records(tmp_path / "records.jsonl", 8)
    recipe = recipe_of(zoo("llama"), data, tmp_path / "run", "train.micro_batch=4", f"distributed.kind={kind}")

    def resolve(rank: int, notify: Notify) -> None:
        sys.addaudithook(count_opened)
        resources = resolve_resources(recipe)
        assert resources.plan is not None and resources.micro_batches == (4,) * world_size
        assert opened["config.json"] == 1, opened

    children = ranks(resolve, tmp_path, world_size)
    assert [child.wait() for child in children] == [0] * world_size
