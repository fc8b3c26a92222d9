"""An invalid model folder is refused with a one-line error before training."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora.errors import BaseModelError
from qlora.model import Model
from qlora.model.load_base import load
from qlora.quant import Quant, build_quantizer

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
UP, EMBEDDING = "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"
BIAS = "model.layers.0.self_attn.q_proj.bias"
Change = Callable[[Path], Any]


def refusal(folder: Path | str, **settings: str) -> str:
    with pytest.raises(BaseModelError) as caught:
        load(Model(name=str(folder), **settings), build_quantizer(Quant()), torch.device("cpu"))
    message = str(caught.value)
    assert message.startswith("model") and "\n" not in message and len(message) < 600, message
    return message


@pytest.fixture
def folder(zoo: Any, tmp_path: Path) -> Path:
    """A good model folder that a test may break."""
    return Path(shutil.copytree(zoo("llama-tied-bias"), tmp_path / "model"))


def with_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Change:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / SINGLE)
        changed = change(tensors)
        save_file(tensors if changed is None else changed, folder / SINGLE, metadata={"format": "pt"})

    return apply


def without(name: str) -> Change:
    return with_tensors(lambda tensors: {key: value for key, value in tensors.items() if key != name})


def with_config(**changes: Any) -> Change:
    def apply(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


def with_index(weight_map: Any) -> Change:
    def apply(folder: Path) -> None:
        (folder / INDEX).write_text(json.dumps(weight_map))

    return apply


def only_pickle(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


def points_outside(folder: Path) -> None:
    shutil.copy(folder / SINGLE, folder.parent / SINGLE)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(load_file(folder / SINGLE), f"../{SINGLE}")}))


def key_in_the_wrong_file(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    save_file({UP: tensors[UP]}, folder / "a.safetensors")
    save_file({name: value for name, value in tensors.items() if name != UP}, folder / "b.safetensors")
    (folder / SINGLE).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "b.safetensors")}))


def set_value(name: str, value: float) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[3] = value

    return with_tensors(change)


def truncate(folder: Path) -> None:
    content = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(content[: len(content) // 2])


def random_header(folder: Path) -> None:
    (folder / SINGLE).write_bytes(b"\xff" * 64)


def quantized_to(dtype: torch.dtype, extra: str) -> Change:
    """8-bit weights with their scales in a second tensor, as other tools store them."""

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        scale = torch.ones(tensors[UP].shape[0])
        return tensors | {UP: (tensors[UP] * 100).to(dtype), UP.removesuffix("weight") + extra: scale}

    return with_tensors(change)


REFUSED: dict[str, tuple[Change, str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "config truncated": (lambda folder: (folder / "config.json").write_text('{"model_type": "ll'), "config.json"),
    "config a list": (lambda folder: (folder / "config.json").write_text("[1, 2]"), "config.json"),
    "config of an unknown model": (with_config(model_type="xyzzy"), "xyzzy"),
    "config without a type": (lambda folder: (folder / "config.json").write_text("{}"), "config.json"),
    "width is a text": (with_config(hidden_size="wide"), "hidden_size"),
    "width is negative": (with_config(hidden_size=-64), "model"),
    "no heads": (with_config(num_attention_heads=0), "model"),
    "experts": (with_config(model_type="mixtral", architectures=["MixtralForCausalLM"]), "mlp.experts.gate_up_proj.0"),
    "nothing but pickle": (only_pickle, "pytorch_model.bin"),
    "no weights": (lambda folder: (folder / SINGLE).unlink(), "no *.safetensors"),
    "no tokenizer": (lambda folder: [file.unlink() for file in folder.glob("tokenizer*")], "tokenizer"),
    "weights truncated": (truncate, SINGLE),
    "weights are noise": (random_header, SINGLE),
    "weights are empty": (lambda folder: (folder / SINGLE).write_bytes(b""), SINGLE),
    "index points outside": (points_outside, "files of its own folder"),
    "index names a missing file": (with_index({"weight_map": {UP: "gone.safetensors"}}), "gone.safetensors"),
    "index names no safetensors": (with_index({"weight_map": {UP: "config.json"}}), "config.json"),
    "index is a list": (with_index([1]), INDEX),
    "index map is a list": (with_index({"weight_map": [UP]}), INDEX),
    "index sends a key to the wrong file": (key_in_the_wrong_file, UP),
    "a linear layer is missing": (without(UP), UP),
    "a norm is missing": (without("model.norm.weight"), "model.norm.weight"),
    "a bias is missing": (without(BIAS), BIAS),
    "the embedding is missing": (without(EMBEDDING), EMBEDDING),
    "a linear layer of another shape": (with_tensors(lambda t: t | {UP: torch.zeros(64, 96)}), UP),
    "a linear layer without a dimension": (with_tensors(lambda t: t | {UP: torch.tensor(1.0)}), UP),
    "an embedding of another shape": (with_tensors(lambda t: t | {EMBEDDING: torch.zeros(100, 64)}), EMBEDDING),
    "a bias of another shape": (with_tensors(lambda t: t | {BIAS: torch.zeros(1)}), BIAS),
    "not a number in a weight": (set_value(UP, float("nan")), UP),
    "infinity in a weight": (set_value(UP, float("inf")), UP),
    "not a number in an embedding": (set_value(EMBEDDING, float("nan")), EMBEDDING),
    "not a number in a norm": (set_value("model.norm.weight", float("nan")), "model.norm.weight"),
    "8-bit codes": (quantized_to(torch.int8, "unknown_scale"), UP),
    "8-bit floats": (quantized_to(torch.float8_e4m3fn, "unknown_scale"), UP),
}


@pytest.mark.sample(of=2)
@pytest.mark.parametrize("case", REFUSED)
def test_a_broken_folder_is_refused_by_name(folder: Path, case: str) -> None:
    change, name = REFUSED[case]
    change(folder)
    message = refusal(folder)
    assert name in message, message


@pytest.mark.parametrize("name", ["./not/here", "not-here", "/not/here", "no/body/here", "some-one/some-model"])
def test_a_name_without_a_model_is_refused(name: str) -> None:
    assert name.removeprefix("./") in refusal(name)


def test_a_file_in_place_of_a_folder_is_refused(folder: Path) -> None:
    assert "a file" in refusal(folder / SINGLE)


def test_code_in_the_folder_is_never_run(folder: Path) -> None:
    with_config(model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"})(folder)
    marker = folder / "it-ran"
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w')\n")
    refusal(folder)
    assert not marker.exists()


def test_an_attention_that_is_not_installed_is_refused(folder: Path) -> None:
    assert "flash" in refusal(folder, attention="flash_attention_3").lower()
