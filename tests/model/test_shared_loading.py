"""Several processes read one base: each tensor once, by one of them; what one finds wrong all end with, said once."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.child_processes import Tell
from support.rank_processes import ranks
from support.small_runs import recipe_of, write_rows

from qlora.adapters.inject import frozen_linears
from qlora.cli.app import run as run_cli
from qlora.model import quantized_cache
from qlora.model.frozen_digest import frozen_sha256
from qlora.model.weight_loader import WeightLoader
from qlora.recipe.recipe import Recipe, dump
from qlora.runs.memory_setup import load_base
from qlora.runs.strategy import open_processes

Zoo = Callable[..., Path]


def load_together(recipe: Recipe, home: Path, world: int) -> list[dict[str, object]]:
    """What each process has after loading: fingerprint, its own digest, notes, tensors read, bytes, all gathered."""

    def work(rank: int, tell: Tell) -> None:
        processes, read = open_processes(recipe), list[str]()
        reads = WeightLoader._read

        def counted(self: WeightLoader, wanted: object, shards: object) -> object:
            read.append(wanted.key)  # type: ignore[attr-defined]
            return reads(self, wanted, shards)  # type: ignore[arg-type]

        WeightLoader._read = counted  # type: ignore[assignment, method-assign]
        base = load_base(recipe, processes.device, None, processes=processes)
        parameters = base.model.parameters()
        held = sum(p.to_local().nbytes if hasattr(p, "to_local") else p.nbytes for p in parameters)
        whole = [int(t.long().sum()) for each in frozen_linears(base.model).values() for t in [each.stored()["codes"]]]
        found = {"sha256": base.manifest.sha256, "notes": base.notes, "read": read, "held": held, "codes": whole}
        (home / f"found-{rank}").write_text(json.dumps(found | {"own": frozen_sha256(base.model)}))
        processes.end()

    codes = [child.end() for child in ranks(work, home, world)]
    assert codes == [0] * world, (home / "said-0").read_text()
    return [json.loads((home / f"found-{rank}").read_text()) for rank in range(world)]


@pytest.mark.parametrize(("kind", "world"), [("ddp", 2), ("fsdp", 3)])
def test_each_tensor_is_read_once_and_every_process_has_the_same_base(
    zoo: Zoo, tmp_path: Path, kind: str, world: int
) -> None:
    model = zoo("qwen2")
    data = write_rows(tmp_path / "rows.jsonl", 2)
    one = load_together(recipe_of(model, data, tmp_path / "run"), tmp_path, 1)[0]
    many = load_together(recipe_of(model, data, tmp_path / "run", f"distributed.kind={kind}"), tmp_path, world)
    assert {each["sha256"] for each in many} == {one["sha256"]}
    assert all(each["codes"] == one["codes"] for each in many)
    read = [key for each in many for key in each["read"]]  # type: ignore[attr-defined]
    assert sorted(read) == sorted(one["read"]) and all(each["read"] for each in many)  # type: ignore[call-overload]
    held = [each["held"] for each in many]
    if kind == "fsdp":
        assert sum(held) == one["held"] and max(held) < one["held"] / world * 1.1  # type: ignore[type-var, operator]


def test_a_kept_base_is_read_by_all_and_read_anew_where_it_is_damaged(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized_cache, "SMALLEST_BYTES", 0)
    monkeypatch.setattr(quantized_cache, "PART_BYTES", 2**14)
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    data = write_rows(tmp_path / "rows.jsonl", 2)
    alone, shared = (
        recipe_of(zoo("llama"), data, tmp_path / "run", f"distributed.kind={kind}") for kind in ("single", "fsdp")
    )
    one = load_together(alone, tmp_path, 1)[0]
    parts = sorted((tmp_path / "cache").rglob("part-*.safetensors"))
    assert len(parts) > 4
    kept = load_together(shared, tmp_path, 2)
    assert all(each["codes"] == one["codes"] and "kept it" in str(each["notes"]) for each in kept)
    assert all(each["read"] == [] for each in kept)
    damaged = bytearray(parts[-1].read_bytes())
    damaged[-1] ^= 1
    parts[-1].write_bytes(bytes(damaged))
    again = load_together(shared, tmp_path, 2)
    assert all(each["codes"] == one["codes"] and "does not verify" in str(each["notes"]) for each in again)


def test_a_damaged_tensor_that_one_process_finds_ends_all_with_one_line(zoo: Zoo, tmp_path: Path) -> None:
    model = shutil.copytree(zoo("llama"), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.nan
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    data, file = write_rows(tmp_path / "rows.jsonl", 8), tmp_path / "recipe.yaml"
    file.write_text(dump(recipe_of(model, data, tmp_path / "run", "distributed.kind=fsdp")))

    def work(rank: int, tell: Tell) -> int:
        return run_cli(["train", str(file)])

    assert [child.end() for child in ranks(work, tmp_path, 2)] == [2, 2]
    said = "".join((tmp_path / f"said-{rank}").read_text() for rank in (0, 1))
    assert said.count("error: ") == 1 and "up_proj" in said and "NaN" in said
