"""Public reports about base models with odd configurations: they train, answer and merge; transformers loads them."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from support.command_line import qlora
from support.small_runs import recipe_of, run, write_records
from support.tiny_models import VOCABULARY, byte_tokenizer
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

Zoo = Callable[..., Path]
pytestmark = pytest.mark.xdist_group("public bases")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor in the safetensors files of a folder."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as stream:
            tensors |= {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
    return tensors


def trained_and_merged(base: Path, folder: Path) -> Path:
    """The merged folder of a run of one step; `qlora generate` answers before."""
    recipe = recipe_of(base, write_records(folder / "data.jsonl", 4), folder / "run", "train.max_steps=1")
    run(recipe)
    [row] = qlora("generate", folder / "run", "hello", "--max-new-tokens", 3, "--json").json["rows"]
    assert 1 <= len(row["output_ids"]) <= 3
    merged = folder / "merged"
    options = ("--to", "merged", "--dtype", "float32", "--rows", 0)
    assert qlora("export", folder / "run", merged, *options).code == 0
    return merged


def test_odd_generation_settings_train_answer_and_merge(zoo: Zoo, tmp_path: Path) -> None:
    """LlamaFactory#2479, #2545, LLaVA#1745: sampling settings without sampling, pad -1, no dtype, no end token."""
    base = Path(shutil.copytree(zoo("llama"), tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    for key in ("dtype", "torch_dtype", "eos_token_id", "bos_token_id"):
        config.pop(key, None)
    (base / "config.json").write_text(json.dumps(config | {"pad_token_id": -1}))
    generation = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "pad_token_id": -1}
    (base / "generation_config.json").write_text(json.dumps(generation))
    merged = trained_and_merged(base, tmp_path)
    assert tensors_of(merged).keys() == tensors_of(base).keys()
    AutoModelForCausalLM.from_pretrained(merged)


@pytest.fixture(scope="module")
def wrapper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny Gemma-3 with a vision tower."""
    text = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 256,
            "query_pre_attn_scalar": 16, "sliding_window": 32, "bos_token_id": 1, "eos_token_id": 2,
            "pad_token_id": 0}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=3)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("wrapper")
    Gemma3ForConditionalGeneration(config).to(torch.float32).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    yield folder


def test_a_text_run_keeps_every_tensor_of_a_vision_checkpoint(wrapper: Path, tmp_path: Path) -> None:
    """vllm#48019, axolotl PR#3409: a merge of the text model alone, or under other keys, is refused by servers."""
    before, after = tensors_of(wrapper), tensors_of(trained_and_merged(wrapper, tmp_path))
    assert after.keys() == before.keys() and len(after) > 40
    vision = [key for key in before if "vision" in key or "projector" in key]
    assert vision and all(torch.equal(before[key], after[key]) for key in vision)
    assert not torch.equal(
        before[(key := next(key for key in before if "q_proj" in key and "language" in key))], after[key]
    )
