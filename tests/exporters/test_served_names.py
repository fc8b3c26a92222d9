"""Adapters of wrapper checkpoints under the names of the class that reads them; other names are refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.adapted_models import identity_of, inject_trained, load_base, logits
from support.expert_models import EXPERTS, save_expert_model
from support.wrapper_families import WRAPPER_FAMILIES, save_wrapper

from qlora.adapters import peft_files
from qlora.errors import AdapterError
from qlora.exporters import ExportRequest
from qlora.exporters.export_run import export_run
from qlora.exporters.served_names import reader_class, refuse_unmatched, served_class
from qlora.model.meta_model import read_config
from qlora.model.wrapper_models import factory_name
from qlora.runs.load_run import load_run

Zoo = Callable[..., Path]


def export_both(base: Path, folder: Path) -> dict[str, Path]:
    """Exports `adapter` and `portable` of an adapter that was trained by qlora on a base."""
    loaded = load_base(base, "dense")
    adapter = inject_trained(loaded, "rslora")
    (folder / "source").mkdir()
    peft_files.write(folder / "source", loaded.model, adapter, identity_of(loaded))
    for target in ("adapter", "portable"):
        export_run(load_run(str(folder / "source")), ExportRequest(target), str(folder / target))
    return {target: folder / target for target in ("adapter", "portable")}


def with_adapter(factory: Any, base: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(factory.from_pretrained(base, dtype=torch.float32).eval(), adapter)


@pytest.mark.sample(of=4)
@pytest.mark.parametrize("family", WRAPPER_FAMILIES)
def test_both_exports_act_alike_in_the_class_that_reads_them(family: str, tmp_path: Path) -> None:
    base = save_wrapper(tmp_path / "base", family)
    config = read_config(base)
    trained = getattr(transformers, factory_name(config))
    served = getattr(transformers, config.architectures[0])
    exports = export_both(base, tmp_path)
    plain = logits(trained.from_pretrained(base, dtype=torch.float32).eval())
    from_adapter = logits(with_adapter(trained, base, exports["adapter"]))
    from_portable = logits(with_adapter(served, base, exports["portable"]))
    torch.testing.assert_close(from_portable, from_adapter, rtol=0, atol=1e-4)
    assert (plain - from_adapter).abs().max() > 0.1  # the update is not negligible
    assert {name.split(".")[3] for name in load_file(exports["portable"] / peft_files.WEIGHTS)} == {"language_model"}
    refuse_unmatched(exports["portable"], served_class(base))


def test_an_adapter_with_names_of_another_class_is_refused(tmp_path: Path) -> None:
    base = save_wrapper(tmp_path / "base", "qwen3_5")
    exports = export_both(base, tmp_path)
    refuse_unmatched(exports["adapter"], reader_class(base))
    with pytest.raises(AdapterError, match="match no module of Qwen3_5ForConditionalGeneration"):
        refuse_unmatched(exports["adapter"], served_class(base))
    with pytest.raises(AdapterError, match="match no module of Qwen3_5ForCausalLM"):
        refuse_unmatched(exports["portable"], reader_class(base))


@pytest.mark.parametrize("old, new", [("model.layers", "model.layer"), ("q_proj", "down_proj")])
def test_one_planted_name_or_shape_is_caught(zoo: Zoo, old: str, new: str, tmp_path: Path) -> None:
    folder = export_both(zoo("llama"), tmp_path)["portable"]
    named = load_file(folder / peft_files.WEIGHTS)
    key = next(key for key in named if "layers.1" in key and "q_proj" in key)
    named[key.replace(old, new)] = named.pop(key)
    save_file(named, folder / peft_files.WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="1 tensors of the adapter match no module of LlamaForCausalLM"):
        refuse_unmatched(folder, served_class(zoo("llama")))


@pytest.mark.sample(of=2)
@pytest.mark.parametrize("family", EXPERTS)
def test_the_stacks_of_experts_match(family: str, tmp_path: Path) -> None:
    base = save_expert_model(tmp_path / "base", family)
    loaded = load_base(base, "dense")
    adapter = inject_trained(loaded, "lora")
    peft_files.write(tmp_path, loaded.model, adapter, identity_of(loaded))
    refuse_unmatched(tmp_path, served_class(base))
