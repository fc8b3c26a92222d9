"""A model whose matrices stay on disk gives the loaded model's logits bit for bit, and holds no matrix."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.tiny_models import FAMILIES

from qlora.errors import BaseModelError
from qlora.model import Model
from qlora.model.lazy_model import OnDiskLinear, load_lazy_model
from qlora.model.load_base import load
from qlora.quant.dense import Dense

Zoo = Callable[..., Path]
CPU = torch.device("cpu")
IDS = torch.tensor([[5, 9, 3, 7, 11, 2]])


@pytest.mark.sample(of=3)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_lazy_model_gives_the_same_logits_and_holds_no_matrix(zoo: Zoo, family: str) -> None:
    folder = zoo(family)
    loaded = load(Model.model_validate({"name": str(folder), "dtype": "float32"}), Dense(), CPU).model
    lazy = load_lazy_model(folder, torch.float32, "auto", CPU)
    with torch.no_grad():
        assert torch.equal(lazy(input_ids=IDS).logits, loaded(input_ids=IDS).logits)
    matrices = [module for module in lazy.modules() if isinstance(module, OnDiskLinear)]
    assert matrices and not any("weight" in dict(module.named_parameters()) for module in matrices)


def test_a_missing_tensor_or_another_shape_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    shutil.copytree(zoo("llama"), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    for key, value in (("intermediate_size", config["intermediate_size"] * 2), ("num_hidden_layers", 9)):
        (tmp_path / "model" / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(BaseModelError, match=r"layers\.\d+\..* should be .* found"):
            load_lazy_model(tmp_path / "model", torch.float32, "auto", CPU)
