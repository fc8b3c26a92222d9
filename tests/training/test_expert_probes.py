"""Probes of expert adapters: planted frozen experts and wrong columns are refused; loads are measured and shown."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapted_models import IDS, load_base
from support.expert_models import randomize_updates
from support.small_runs import differing_tensors, recipe_of, run, write_records
from torch import Tensor
from torch.nn import functional as F

from qlora.adapters.expert_lora import ExpertLora
from qlora.adapters.inject import adapted_experts, inject
from qlora.adapters.lora import Lora
from qlora.data.types import Example
from qlora.errors import QloraError
from qlora.model.float16_products import multiply_in_float16
from qlora.model.linear_layers import frozen_linears
from qlora.model.load_base import Base
from qlora.model.module_tree import set_by_path
from qlora.runs.report.expert_table import expert_table
from qlora.runs.report.run_data import RunData
from qlora.training.expert_gradients import watch_experts
from qlora.training.expert_load import ExpertLoads, measure_loads
from qlora.training.expert_probe import refuse_wrong_columns

Zoo = Callable[[str], Path]
STEPS = 4
PLANTED_STACK, PLANTED = "model.layers.1.mlp.experts.down_proj", 2


class FrozenExpert(ExpertLora):
    """An expert without its update."""

    def forward(self, x: Tensor, expert: int) -> Tensor:
        return self.base(x, expert) if expert == PLANTED else super().forward(x, expert)


class DetachedSide(ExpertLora):
    """An expert whose A gets no gradient."""

    def _sides(self, expert: int) -> tuple[Tensor, Tensor]:
        a, b = super()._sides(expert)
        return (a.detach() if expert == PLANTED else a), b


class WrongColumns(ExpertLora):
    """Experts with the B of another one, as with the expert index slowest in the file."""

    def _sides(self, expert: int) -> tuple[Tensor, Tensor]:
        return super()._sides(expert)[0], super()._sides((expert + 1) % len(self))[1]


def plant(base: Base, kind: type[ExpertLora]) -> None:
    layer = base.model.get_submodule(PLANTED_STACK)
    planted = kind(layer.base, layer.rank, layer.scaling, 0.0)
    planted.A, planted.B = layer.A, layer.B
    set_by_path(base.model, PLANTED_STACK, planted)


def train(base: Base, sees_all: bool = True, ids: Tensor = IDS, steps: int = STEPS, rate: float = 1e-2) -> list[str]:
    """Optimizer steps under the watch; returns what it logged."""
    lines: list[str] = []
    optimizer = torch.optim.AdamW([p for p in base.model.parameters() if p.requires_grad], lr=rate)
    watch_experts(optimizer, base.model, sees_all, lines.append)
    for _ in range(steps):
        for row in ids:  # two micro-batches
            out = base.model(input_ids=row[None]).logits
            F.cross_entropy(out[0, :-1], row[1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return lines


@pytest.fixture
def base(expert_zoo: Zoo) -> Base:
    base = load_base(expert_zoo("qwen3_moe"), "nf4")
    inject(base.model, Lora(4, 8.0, 0.0, expert_rank=1), "all-linear", 0)
    return base


# ---- gradients


def test_every_visited_expert_has_gradients_and_hooks_are_removed(base: Base) -> None:
    (line,) = train(base, steps=STEPS + 1)
    assert line.startswith("experts: every one of ") and line.endswith("of 8 were not visited")
    experts = base.model.get_submodule(PLANTED_STACK.rpartition(".")[0])
    assert not experts._forward_hooks


def test_experts_without_tokens_are_counted(base: Base) -> None:
    ids = torch.full((2, 3), 7)  # one token, which visits two experts of each layer
    (line,) = train(base, ids=ids, rate=1e-6)  # so that the router chooses the same ones in each step
    assert line.startswith("experts: every one of 4 that trained tokens visited in 4 steps has gradients; 4 of 8 were")


@pytest.mark.sample(of=2)
@pytest.mark.parametrize(("kind", "side"), [(FrozenExpert, "A"), (FrozenExpert, "B"), (DetachedSide, "A")])
@pytest.mark.parametrize("sees_all", [True, False])
def test_a_planted_frozen_expert_is_refused(base: Base, kind: type[ExpertLora], side: str, sees_all: bool) -> None:
    plant(base, kind)
    if side == "A":
        randomize_updates(base.model)  # at its start B is zero, and A has no gradient anyway
    with pytest.raises(QloraError, match=rf"no gradient reaches {PLANTED_STACK}\.[AB] of experts {PLANTED} in 4 steps"):
        train(base, sees_all)


def test_a_gradient_for_an_expert_without_tokens_is_refused(base: Base) -> None:
    plant(base, WrongColumns)
    with pytest.raises(QloraError, match=rf"{PLANTED_STACK}\.B has a gradient for experts \d.*no token"):
        train(base, ids=torch.full((2, 3), 7))


# ---- columns


@pytest.mark.sample(of=2, every=("family",))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_the_columns_of_every_layout_are_right(expert_zoo: Zoo, family: str, dtype: str) -> None:
    base = load_base(expert_zoo(family), "nf4", dtype)
    inject(base.model, Lora(4, 8.0, 0.1, expert_rank=3), "all-linear", 0)
    before = [layer.B.clone() for layer in adapted_experts(base.model).values()]
    difference = refuse_wrong_columns(base.model)
    assert difference is not None and difference < (1e-4 if dtype == "float32" else 0.1)
    after = [layer.B for layer in adapted_experts(base.model).values()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_planted_wrong_columns_are_refused(base: Base) -> None:
    for path in adapted_experts(base.model):
        layer = base.model.get_submodule(path)
        planted = WrongColumns(layer.base, layer.rank, layer.scaling, 0.0)
        planted.A, planted.B = layer.A, layer.B
        set_by_path(base.model, path, planted)
    with pytest.raises(QloraError, match="expert 0 computes another update than its columns"):
        refuse_wrong_columns(base.model)


def test_models_without_experts_have_no_probe(zoo: Callable[..., Path]) -> None:
    base = load_base(zoo("llama"), "nf4")
    inject(base.model, Lora(4, 8.0, 0.0), "all-linear", 0)
    assert refuse_wrong_columns(base.model) is None and train(base) == []
    assert measure_loads(base.model, [], base.device) == (0, {})


def test_the_experts_of_a_stack_multiply_in_one_dtype(base: Base) -> None:
    multiply_in_float16(base.model, {PLANTED_STACK})
    dtypes = {path: layer.product_dtype for path, layer in frozen_linears(base.model).items()}
    in_float32 = {path for path, dtype in dtypes.items() if dtype is None}
    assert in_float32 == {f"{PLANTED_STACK}.{expert}" for expert in range(4)} and len(dtypes) == 8 + 16


# ---- loads


def test_loads_are_the_routers_choices(base: Base) -> None:
    ids = IDS[0].numpy()
    tokens, loads = measure_loads(base.model, [Example("x", ids, ids), Example("y", ids[:9], ids[:9])], base.device)
    assert tokens == len(ids) + 9 and len(loads) == 2
    chosen: dict[str, list[Tensor]] = {path: [] for path in loads}
    for path in loads:
        record = lambda _, args, path=path: chosen[path].append(args[1])  # noqa: E731
        base.model.get_submodule(path).register_forward_pre_hook(record)
    with torch.no_grad():
        base.model(input_ids=IDS[:1])
        base.model(input_ids=IDS[:1, :9])
    for path, shares in loads.items():
        counts = torch.bincount(torch.cat(chosen[path]).flatten(), minlength=4)
        assert shares == pytest.approx((counts / counts.sum()).tolist()) and sum(shares) == pytest.approx(1)


def test_unvisited_experts_are_one_line() -> None:
    loads = ExpertLoads(1234, {"a": [0.5, 0.0, 0.5], "b": [1.0, 0.0, 0.0]})
    assert str(loads).startswith("experts: 3 of 6 are visited by none of the first 1,234 tokens")


def test_the_table_is_bounded_and_empty_without_experts() -> None:
    layers = {f"model.layers.{n}.mlp.experts": [1 / 128] * 128 for n in range(48)}
    table = str(expert_table(RunData("run", {"experts": {"tokens": 8192, "before": layers, "after": layers}})))
    assert table.count("<tr>") == 49 and len(table) < 12_000
    assert "128 \u2192 128 of 128" in table and "128.0 \u2192 128.0" in table and "0.8% \u2192 0.8%" in table
    assert expert_table(RunData("run", {})) is None
    broken: dict[str, Any] = {"experts": {"before": {"a": "x", "b": []}, "after": None}}
    assert expert_table(RunData("run", broken)) is None


# ---- a run


def test_a_run_resumes_bit_for_bit_and_reports_its_experts(expert_zoo: Zoo, tmp_path: Path) -> None:
    data, folder, model = write_records(tmp_path / "rows.jsonl", 12), tmp_path / "run", expert_zoo("qwen3_moe")
    settings = ("train.max_steps=3", "train.save_every=2", "adapter.dropout=0.1")
    manifest = run(recipe_of(model, data, folder, *settings))
    adapter, experts = manifest["adapter"], manifest["experts"]
    assert adapter["expert_rank"] == 2 and len(adapter["paths"]) == 12
    assert experts["before"].keys() == experts["after"].keys() and len(experts["before"]) == 2
    assert all(len(shares) == 4 for shares in experts["after"].values()) and experts["before"] != experts["after"]
    assert "Load of experts" in (folder / "report.html").read_text()
    assert manifest["spectrum"][PLANTED_STACK]["rank"] == 2 and len(manifest["spectrum"]) == 12
    resumed = run(recipe_of(model, data, tmp_path / "again", *settings, f"train.resume={folder / 'checkpoint-000002'}"))
    assert differing_tensors(folder, tmp_path / "again") == [] and resumed["experts"] == experts
