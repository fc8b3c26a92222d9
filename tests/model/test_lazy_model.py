"""A model whose matrices stay in its files is that model, bit for bit, and holds none of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.tiny_models import FAMILIES

from qlora.errors import BaseModelError
from qlora.model import Model
from qlora.model.lazy_model import FiledLinear, model_in_files
from qlora.model.load_base import load
from qlora.quant.dense import Dense

Zoo = Callable[..., Path]
CPU = torch.device("cpu")
IDS = torch.tensor([[5, 9, 3, 7, 11, 2]])


@pytest.mark.parametrize("family", FAMILIES)
def test_it_answers_as_the_loaded_model_and_holds_no_matrix(zoo: Zoo, family: str) -> None:
    folder = zoo(family)
    loaded = load(Model.model_validate({"name": str(folder), "dtype": "float32"}), Dense(), CPU).model
    filed = model_in_files(folder, torch.float32, "auto", CPU)
    with torch.no_grad():
        assert torch.equal(filed(input_ids=IDS).logits, loaded(input_ids=IDS).logits)
    matrices = [module for module in filed.modules() if isinstance(module, FiledLinear)]
    assert matrices and not any("weight" in dict(each.named_parameters()) for each in matrices)


def test_what_is_missing_or_has_another_shape_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    shutil.copytree(zoo("llama"), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    for key, value in (("intermediate_size", config["intermediate_size"] * 2), ("num_hidden_layers", 9)):
        (tmp_path / "model" / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(BaseModelError, match=r"layers\.\d+\..* should be .* found"):
            model_in_files(tmp_path / "model", torch.float32, "auto", CPU)
