"""The plan's bytes: exact where they can be, near the reference where that was derived, and consistent everywhere."""

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some
from support.published_models import CONFIGS, work_of

from qlora.exporters import certificate
from qlora.exporters.merged import CHUNK
from qlora.memory.planner import export_and_disk
from qlora.memory.planner.breakdown import HOSTED_PIECE_BYTES, OWNERS
from qlora.memory.planner.memory_plan import Budget, plan
from qlora.memory.planner.search import choose
from qlora.memory.planner.workload import LOGITS_BYTES, Storage
from qlora.model.lm_head import CHUNK_BYTES
from qlora.quant import QUANTIZERS
from qlora.training.offloaded_adamw import PIECE_VALUES

GIB = 2**30
# performance.md, after 2.3: GiB at rank 16, all recomputed, embeddings in host memory; T = 512, 2,048, 8,192.
DERIVED = {
    "Llama-2-7B": (4.5, 5.1, 7.4),
    "Llama-3.1-8B": (5.8, 6.4, 8.7),
    "Llama-2-13B": (7.8, 8.7, 12.0),
    "Qwen3-32B": (18.9, 20.1, 25.3),
    "Llama-3.1-70B": (38.1, 40.4, 49.6),
}
PARAMETERS = {
    "Llama-2-7B": 6_738_415_616, "Llama-3.1-8B": 8_030_261_248, "Llama-2-13B": 13_015_864_320,
    "Qwen3-32B": 32_762_123_264, "Llama-3.1-70B": 70_553_706_496,
}  # fmt: skip


def peak(name: str, **options: Any) -> int:
    return plan(work_of(name, **options), Budget(0)).peak_bytes


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_the_published_ones(name: str) -> None:
    assert work_of(name).shapes.parameters == PARAMETERS[name]


@pytest.mark.parametrize("name", DERIVED)
@pytest.mark.parametrize("column, length", enumerate((512, 2048, 8192)))
def test_totals_are_near_the_derived_ones(name: str, column: int, length: int) -> None:
    work = work_of(name, max_length=length)
    embedding = 2 * work.shapes.embedding  # ours are on the card
    derived = DERIVED[name][column] * GIB
    assert plan(work, Budget(0)).peak_bytes - embedding == pytest.approx(derived, rel=0.12)


@given(
    kind=some.sampled_from(["nf4", "fp4", "dense"]),
    double=some.booleans(),
    block=some.sampled_from([32, 64, 256, 4096]),
    shape=some.tuples(some.integers(1, 5000), some.integers(1, 5000)),
)
def test_a_stored_matrix_takes_what_the_quantiser_says(
    kind: str, double: bool, block: int, shape: tuple[int, int]
) -> None:
    quantiser = QUANTIZERS[kind]() if kind == "dense" else QUANTIZERS[kind](double=double, block=block)
    stored = Storage(kind, double, block).matrix_bytes(shape[0] * shape[1], dtype_bytes=2)
    assert stored == quantiser.stored_bytes(*shape, 2)


def test_the_loss_takes_its_chunks_as_planned() -> None:
    assert LOGITS_BYTES == CHUNK_BYTES
    assert HOSTED_PIECE_BYTES == 2 * 4 * PIECE_VALUES
    assert (export_and_disk.CERTIFIED_TOKENS, export_and_disk.LOGITS_SHARE) == (
        certificate.BATCH_TOKENS,
        certificate.LOGITS_SHARE,
    )
    assert export_and_disk.SUMMED_BYTES == 3 * 4 * CHUNK


@pytest.mark.parametrize("name", CONFIGS)
def test_what_trains_on_a_card_is_exported_on_it(name: str) -> None:
    for card in (8, 12, 16, 24, 48, 80):
        found = choose(work_of(name), Budget(card * GIB, 64 * GIB))
        assert not found.fits or found.as_json()["export_bytes"] <= card * GIB


def test_the_disk_holds_the_base_twice_over_and_little_else() -> None:
    found = replace(plan(work_of("Llama-3.1-8B"), Budget(24 * GIB)), checkpoints=2).as_json()["disk"]
    assert found["base"] == found["merged"] == 2 * 8_030_261_248
    assert found["kept_base"] / found["base"] == pytest.approx(0.35, abs=0.02)
    assert found["run"] == (4 + 2 * (4 + 8)) * work_of("Llama-3.1-8B").adapters.values


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_owners_add_up_to_the_peak(name: str, device: Any) -> None:
    found = plan(work_of(name, device=device, recompute=3), Budget(24 * GIB))
    assert tuple(found.owners) == OWNERS
    assert min(found.owners.values()) >= 0
    assert sum(found.owners.values()) == found.peak_bytes == max(found.as_json()["phases"].values())


def test_the_json_has_the_keys_of_the_contract() -> None:
    found = plan(work_of("Llama-3.1-8B"), Budget(24 * GIB)).as_json()
    assert found["gpu_bytes"] == 24 * GIB and found["fits"] is True
    assert found["parameters"] == PARAMETERS["Llama-3.1-8B"] and found["trainable_parameters"] == 41_943_040
    keys = {"model", "peak_bytes", "owners", "choice", "host_bytes", "compare"}
    assert keys <= found.keys()
    assert {"recompute", "offload_activations", "weights", "micro_batch"} <= found["choice"].keys()
    compared = found["compare"]
    assert compared["qlora_bytes"] < compared["lora_16bit_bytes"] < compared["full_finetune_bytes"]


@pytest.mark.parametrize("more", [
    {"max_length": 4096}, {"micro_batch": 2}, {"rank": 64}, {"recompute": 20}, {"dtype_bytes": 4},
    {"optimizer": "adamw"}, {"processes": 2}, {"storage": Storage(double=False)},
])  # fmt: skip
def test_more_takes_more(more: dict[str, Any]) -> None:
    assert peak("Llama-3.1-8B", **more) > peak("Llama-3.1-8B")


@pytest.mark.parametrize("less", [{"offloaded": 31}, {"weights": "stream"}, {"storage": Storage(block=128)}])
def test_less_takes_less(less: dict[str, Any]) -> None:
    assert peak("Llama-3.1-8B", **less) < peak("Llama-3.1-8B")


def test_paged_moments_give_way_on_a_card_and_stay_on_a_cpu() -> None:
    work = work_of("Llama-3.1-8B")
    on_cpu = plan(replace(work, device="cpu"), Budget(0))
    assert plan(work, Budget(0)).owners["optimizer"] == 0
    assert on_cpu.owners["optimizer"] == 8 * work.adapters.values
    assert on_cpu.host_bytes == on_cpu.peak_bytes


def test_planning_imports_no_torch() -> None:
    code = (
        "import sys, qlora.memory.planner.search, qlora.memory.planner.config_reader; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
