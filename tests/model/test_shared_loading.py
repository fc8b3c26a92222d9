"""Several ranks load one base: each tensor is read once, by one rank; an error on one rank is reported once."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.child_processes import Notify
from support.rank_processes import ranks
from support.small_runs import recipe_of, write_records

from qlora.cli.app import run as run_cli
from qlora.errors import BaseModelError
from qlora.model import quantized_cache
from qlora.model.frozen_digest import frozen_sha256
from qlora.model.linear_layers import frozen_linears
from qlora.model.weight_loader import WeightLoader
from qlora.recipe.recipe import Recipe, dump
from qlora.runs.memory_setup import load_base
from qlora.runs.resources import open_processes
from qlora.training.base_check import check_base

Zoo = Callable[..., Path]


def load_together(recipe: Recipe, folder: Path, world: int) -> list[dict[str, object]]:
    """Per rank, after loading: fingerprint, notes, keys read, bytes held, and sums of the all-gathered codes."""

    def work(rank: int, notify: Notify) -> None:
        processes, keys = open_processes(recipe), list[str]()
        read = WeightLoader._read

        def counted(self: WeightLoader, parameter: object, reader: object) -> object:
            keys.append(parameter.key)  # type: ignore[attr-defined]
            return read(self, parameter, reader)  # type: ignore[arg-type]

        WeightLoader._read = counted  # type: ignore[assignment, method-assign]
        base = load_base(recipe, processes.device, None, processes=processes)
        parameters = base.model.parameters()
        held = sum(p.to_local().nbytes if hasattr(p, "to_local") else p.nbytes for p in parameters)
        codes = [int(layer.stored()["codes"].long().sum()) for layer in frozen_linears(base.model).values()]
        frozen_sha256(base.model)  # all ranks can compute it
        state = {"sha256": base.manifest.sha256, "notes": base.notes, "keys": keys, "held": held, "codes": codes}
        state["refusal"] = refusal_with_other_frequencies(base.model)
        (folder / f"state-{rank}").write_text(json.dumps(state))
        processes.end()

    exit_codes = [child.wait() for child in ranks(work, folder, world)]
    assert exit_codes == [0] * world, (folder / "log-0").read_text()
    return [json.loads((folder / f"state-{rank}").read_text()) for rank in range(world)]


def refusal_with_other_frequencies(model: Any) -> str:
    """What the start-up check says of a base that is not its class's; all ranks run it together."""
    model.model.rotary_emb.inv_freq.mul_(1.2)
    try:
        check_base(model, lambda line: None)
    except BaseModelError as error:
        return str(error)
    return ""


@pytest.mark.sample(of=4)
@pytest.mark.parametrize(("kind", "world"), [("ddp", 2), ("fsdp", 3)])
def test_each_tensor_is_read_once_and_every_rank_has_the_same_base(
    zoo: Zoo, tmp_path: Path, kind: str, world: int
) -> None:
    model = zoo("qwen2")
    data = write_records(tmp_path / "rows.jsonl", 2)
    one = load_together(recipe_of(model, data, tmp_path / "run"), tmp_path, 1)[0]
    many = load_together(recipe_of(model, data, tmp_path / "run", f"distributed.kind={kind}"), tmp_path, world)
    assert {state["sha256"] for state in many} == {one["sha256"]}
    assert all("layer 1 of 2 differs from transformers' class" in str(state["refusal"]) for state in (one, *many))
    assert all(state["codes"] == one["codes"] for state in many)
    keys = [key for state in many for key in state["keys"]]  # type: ignore[attr-defined]
    assert sorted(keys) == sorted(one["keys"]) and all(state["keys"] for state in many)  # type: ignore[call-overload]
    held = [state["held"] for state in many]
    if kind == "fsdp":
        assert sum(held) == one["held"] and max(held) < one["held"] / world * 1.1  # type: ignore[type-var, operator]


@pytest.mark.sample(of=2)
@pytest.mark.parametrize("damaged", [False, True])
def test_ranks_share_a_cached_base_and_read_the_checkpoint_if_damaged(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    monkeypatch.setattr(quantized_cache, "MIN_BASE_BYTES", 0)
    monkeypatch.setattr(quantized_cache, "PART_BYTES", 2**16)
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    data = write_records(tmp_path / "rows.jsonl", 2)
    single, sharded = (
        recipe_of(zoo("llama"), data, tmp_path / "run", f"distributed.kind={kind}") for kind in ("single", "fsdp")
    )
    one = load_together(single, tmp_path, 1)[0]
    parts = sorted((tmp_path / "cache").rglob("part-*.safetensors"))
    assert len(parts) > 1
    if damaged:
        content = bytearray(parts[-1].read_bytes())
        content[-1] ^= 1
        parts[-1].write_bytes(bytes(content))
    note = "does not verify" if damaged else "from the cache"
    states = load_together(sharded, tmp_path, 2)
    assert all(state["codes"] == one["codes"] and note in str(state["notes"]) for state in states)
    assert damaged or all(state["keys"] == [] for state in states)


def test_a_damaged_tensor_ends_all_ranks_with_one_error_line(zoo: Zoo, tmp_path: Path) -> None:
    model = shutil.copytree(zoo("llama"), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.nan
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    data, file = write_records(tmp_path / "rows.jsonl", 8), tmp_path / "recipe.yaml"
    file.write_text(dump(recipe_of(model, data, tmp_path / "run", "distributed.kind=fsdp")))

    def work(rank: int, notify: Notify) -> int:
        return run_cli(["train", str(file)])

    assert [child.wait() for child in ranks(work, tmp_path, 2)] == [2, 2]
    log = "".join((tmp_path / f"log-{rank}").read_text() for rank in (0, 1))
    assert log.count("error: ") == 1 and "up_proj" in log and "NaN" in log
