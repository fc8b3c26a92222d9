"""Every head computes its class's own logits and loss: scale, soft cap, bias, or whatever else the class does."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.architectures import save_architecture, tiny_config
from support.small_runs import metrics, recipe_of, run, write_records
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from qlora.data.types import IGNORED
from qlora.model import Model
from qlora.model.class_head import HeadFormula, exact
from qlora.model.lm_head import Head
from qlora.model.load_base import load
from qlora.model.module_tree import decoder_of
from qlora.quant.dense import Dense
from qlora.training.loss import TokenLoss

IDS = torch.randint(40, 200, (2, 24), generator=torch.Generator().manual_seed(1))
POSITIONS = torch.arange(24).expand(2, -1)
HEADS: dict[str, tuple[str, dict[str, Any], HeadFormula | None]] = {  # None: the class keeps its own forward
    "plain": ("llama", {}, HeadFormula()),
    "multiplier (Falcon-H1)": ("falcon_h1", {"lm_head_multiplier": 0.3}, HeadFormula(0.3)),
    "scale": ("cohere", {"logit_scale": 0.0625}, HeadFormula(0.0625)),
    "divisor": ("granite", {"logits_scaling": 13.0}, HeadFormula(1 / 13.0)),
    "soft cap": ("gemma2", {"final_logit_softcapping": 20.0}, HeadFormula(1.0, 20.0)),
    "soft cap without a setting (nanochat)": ("nanochat", {}, HeadFormula(1.0, 15.0)),
    "scaled input (MiniCPM3)": ("minicpm3", {}, HeadFormula(0.5)),
    "bias": ("phi", {}, HeadFormula()),
    "a scale for each token (Dory)": ("dory", {}, None),
    "a transform before the head (ModernBERT)": ("modernbert-decoder", {}, None),
    "a transform before the head (BERT)": ("bert", {}, None),
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`folder_of("bias")`: a tiny model with that head, saved at its first use."""

    def save(name: str) -> Path:
        kind, settings, _ = HEADS[name]
        return save_architecture(tmp_path_factory.mktemp(kind), kind, 10**6, settings)

    return cache(save)


def loaded(folder: Path) -> Any:
    return load(Model(name=str(folder), dtype="float32"), Dense(), torch.device("cpu")).model


@pytest.mark.sample(of=3)
@pytest.mark.parametrize("name", HEADS)
def test_logits_loss_and_gradient_are_those_of_the_class(folder_of: Callable[[str], Path], name: str) -> None:
    formula = HEADS[name][2]
    reference: Any = AutoModelForCausalLM.from_pretrained(folder_of(name), dtype=torch.float32).eval()
    hidden_states: list[torch.Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        output.last_hidden_state.retain_grad()
        hidden_states.append(output.last_hidden_state)

    model = loaded(folder_of(name))
    head, loss = Head(model), TokenLoss(model)
    assert head.formula == formula
    decoder_of(reference).register_forward_hook(keep)
    logits = reference(input_ids=IDS, use_cache=False).logits  # Dory's loops read each other's cache
    labels = IDS.clone()
    labels[:, :8] = IGNORED
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    expected.backward()
    hidden = head.hidden_states(IDS, POSITIONS).detach().requires_grad_()
    assert torch.allclose(head(hidden), logits, atol=1e-4 * float(logits.std()))
    assert torch.allclose(head.logits_in_model_dtype(hidden), logits, atol=1e-4 * float(logits.std()))
    ours = loss.of_hidden_states(hidden, labels)
    ours.backward()
    assert float(ours) == pytest.approx(float(expected), rel=1e-5)
    assert torch.allclose(hidden.grad, hidden_states[0].grad, rtol=1e-3, atol=1e-6)  # type: ignore[arg-type]


def test_measured_numbers_become_those_of_the_configuration() -> None:
    config = {"lm_head_multiplier": 0.0195, "hidden_size": 64, "cap": 30.0, "name": "x", "flag": True}
    assert exact(HeadFormula(0.019499999, None), config) == HeadFormula(0.0195)
    assert exact(HeadFormula(1.0000001, 29.99999), config) == HeadFormula(1.0, 30.0)
    assert exact(HeadFormula(1 / 64.00001, None), config) == HeadFormula(1 / 64)
    assert exact(HeadFormula(0.777, 11.0), config) == HeadFormula(0.777, 11.0)  # no such number


def test_the_first_loss_of_falcon_h1_is_the_right_one(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    """The report's case: the multiplier of 0.3 was left out, and the loss was too high without a word."""
    folder = folder_of("multiplier (Falcon-H1)")
    data = write_records(tmp_path / "rows.jsonl", 6)
    options = ("train.max_steps=1", "adapter.targets=[q_proj, v_proj]", "data.eval_fraction=0.5")
    recipe = recipe_of(folder, data, tmp_path / "run", *options, quant={"kind": "dense"})
    run(recipe)
    first = metrics(tmp_path / "run", "eval")[0]["eval_loss"]
    assert first == pytest.approx(loss_by_transformers(folder, recipe), rel=1e-5)


def loss_by_transformers(folder: Path, recipe: Any) -> float:
    """The mean loss of the held-out examples by transformers' own class."""
    from qlora.data.prepare import prepare
    from qlora.recipe.dataset_profile import build_encoder

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total, tokens = 0.0, 0
    for example in prepare(recipe.data, build_encoder(recipe), recipe.train.seed).eval:
        ids, labels = (torch.from_numpy(values.astype("int64"))[None] for values in (example.input_ids, example.labels))
        with torch.no_grad():
            logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        total += float(F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum"))
        tokens += int((labels[:, 1:] != IGNORED).sum())
    return total / tokens


def test_a_shallow_copy_leaves_the_model_unchanged() -> None:
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(tiny_config("gemma3"))
    before = {name: id(module) for name, module in model.named_modules()}
    Head(model)
    assert {name: id(module) for name, module in model.named_modules()} == before
