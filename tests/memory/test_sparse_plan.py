"""Plans of mixtures of experts and hybrids: components, the rank of experts' updates, streaming, steps, no plan."""

from typing import Any

import pytest
from support.published_configs import NEW_CONFIGS
from support.published_models import work_of

from qlora.adapters import Adapter
from qlora.errors import BaseModelError
from qlora.memory.planner.config_reader import shapes_of
from qlora.memory.planner.export_and_disk import disk_bytes
from qlora.memory.planner.memory_plan import Budget, plan
from qlora.memory.planner.search import choose
from qlora.quant import Quant, build_quantizer
from qlora.recipe.planning import adapter_sizes

GIB = 2**30


def components(name: str, **options: Any) -> dict[str, int]:
    return dict(plan(work_of(name, **options), Budget(0)).phases["backward"])


def test_experts_are_stored_one_by_one() -> None:
    """Every expert's matrix has its own codes and scales: no block of two experts."""
    quantizer, experts = build_quantizer(Quant()), 48 * 128
    stacks = experts * (quantizer.stored_bytes(1536, 2048, 2) + quantizer.stored_bytes(2048, 768, 2))
    attention = 48 * sum(
        quantizer.stored_bytes(o, i, 2) for o, i in ((4096, 2048), (512, 2048), (512, 2048), (2048, 4096))
    )
    assert components("Qwen3-30B-A3B")["packed_base"] == stacks + attention


def test_one_expert_is_rebuilt_at_a_time() -> None:
    assert components("Qwen3-30B-A3B")["dequantisation_buffer"] < 3 * 2 * 4096 * 2048  # less than a stack of 128


def test_routers_stay_in_16_bits() -> None:
    assert components("Qwen3-30B-A3B")["routers"] == 2 * 48 * 128 * 2048
    assert components("Llama-3.1-8B")["routers"] == 0


@pytest.mark.parametrize(("setting", "rank"), [("auto", 2), (0, 0), (5, 5)])
def test_the_rank_of_experts_updates(setting: Any, rank: int) -> None:
    shapes = shapes_of(NEW_CONFIGS["Qwen3-30B-A3B"], "model")
    sizes = adapter_sizes(Adapter(rank=16, expert_rank=setting), shapes)
    attention = 48 * 16 * (4096 + 2048 + 2 * (512 + 2048) + 2048 + 4096)
    assert sizes.values == attention + 48 * 128 * rank * (1536 + 2048 + 2048 + 768)


def test_a_rank_is_at_least_one() -> None:
    sizes = adapter_sizes(Adapter(rank=4), shapes_of(NEW_CONFIGS["Qwen3-30B-A3B"], "model"))
    assert sizes.expert_rank == 1


def test_30b_with_experts_fits_8_gib_by_streaming() -> None:
    chosen = choose(work_of("Qwen3-30B-A3B"), Budget(8 * GIB, 32 * GIB))
    assert chosen.fits and 0 < chosen.work.streamed < 48 and chosen.host_bytes <= 32 * GIB
    values = chosen.as_json()
    assert values["step_seconds"] > 0 and f"{chosen.step_seconds:.1f} s" in str(chosen)


def test_a_table_that_every_layer_reads_is_in_host_memory() -> None:
    on_gpu, on_cpu = work_of("Gemma-4-E4B"), work_of("Gemma-4-E4B", device="cpu")
    table = 2 * on_gpu.shapes.layer_table
    assert table == 2 * 262_144 * 256 * 42
    embeddings = [plan(work, Budget(0)).phases["load"]["embeddings"] for work in (on_gpu, on_cpu)]
    assert embeddings[1] - embeddings[0] == table <= plan(on_gpu, Budget(0)).host_bytes


def test_towers_take_disk_and_no_memory() -> None:
    wrapped = work_of("Qwen3.5-9B")
    alone = shapes_of(NEW_CONFIGS["Qwen3.5-9B"]["text_config"], "model")
    assert wrapped.shapes.parameters == alone.parameters and wrapped.shapes.stored_only > 400_000_000
    merged = disk_bytes(wrapped, 0)["merged"]
    assert merged == 2 * (wrapped.shapes.parameters + wrapped.shapes.stored_only)


def test_a_family_that_is_not_known_is_named_in_one_line() -> None:
    with pytest.raises(BaseModelError, match="model_type 'deepseek_v4', so there is no memory plan") as raised:
        shapes_of({"model_type": "deepseek_v4"}, "model")
    assert len(str(raised.value)) < 240 and "\n" not in str(raised.value)
