"""Public reports about base model folders, rebuilt in small: read as transformers reads them, or refused by `check`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.command_line import qlora
from support.tiny_models import CHATML, byte_tokenizer

from qlora.errors import BaseModelError
from qlora.model.model_folder import INDEX, require_model_folder
from qlora.model.safetensors_reader import SafetensorsReader

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 4976698672\n"
Zoo = Callable[..., Path]


@pytest.fixture
def base(zoo: Zoo, tmp_path: Path) -> Path:
    """A copy of a tiny model in three files with an index."""
    return Path(shutil.copytree(zoo("llama", max_shard_size="150KB"), tmp_path / "base"))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def refusal(folder: Path) -> str:
    with pytest.raises(BaseModelError) as caught:
        require_model_folder(folder)
    return str(caught.value)


def test_a_file_beside_the_ones_of_the_index_is_not_read(base: Path, zoo: Zoo) -> None:
    """mlx-vlm PR#1464: a quantized model.safetensors or Mistral's consolidated.safetensors beside the index."""
    before = {key: tensor.clone() for key, tensor in SafetensorsReader(base).items()}
    for name in ("model.safetensors", "consolidated.safetensors"):
        shutil.copy(zoo("llama", seed=5) / "model.safetensors", base / name)
    after = SafetensorsReader(require_model_folder(base))
    assert after.keys() == before.keys() and all((after[key] == before[key]).all() for key in before)


def test_files_may_have_any_name_that_the_index_gives(base: Path) -> None:
    """unsloth-zoo PR#900: model.safetensors-00001-of-00002.safetensors."""
    index = json.loads((base / INDEX).read_text())
    for file in shards(base):
        file.rename(base / file.name.replace("model-", "model.safetensors-"))
    renamed = {key: name.replace("model-", "model.safetensors-") for key, name in index["weight_map"].items()}
    (base / INDEX).write_text(json.dumps(index | {"weight_map": renamed}))
    assert SafetensorsReader(require_model_folder(base)).keys() == renamed.keys()


def test_a_file_of_the_index_that_is_missing_is_named(base: Path) -> None:
    """sglang PR#32279, CoSER#3: elsewhere its layers stay random."""
    missing = shards(base)[-1]
    missing.unlink()
    assert f"names {missing.name}, which is missing. Fetch the folder again." in refusal(base)


@pytest.mark.parametrize("name", ["model-00001-of-00003.safetensors", "tokenizer.json", "config.json"])
def test_a_pointer_of_git_lfs_is_named_with_the_remedy(base: Path, name: str) -> None:
    """transformers#27923, OmniParser#34: elsewhere `HeaderTooLarge`."""
    (base / name).write_text(POINTER)
    assert f"{name} is a pointer of git-lfs" in refusal(base) and "git lfs pull" in refusal(base)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_file_that_is_cut_off_is_refused_without_reading_it(base: Path, kept: int) -> None:
    """transformers#27923 and ComfyUI#6744: a download that ended early."""
    file = shards(base)[1]
    file.write_bytes(file.read_bytes()[:kept])
    assert f"{file.name} is cut off" in refusal(base) and "Fetch the folder again" in refusal(base)


def test_check_refuses_what_training_would_refuse(base: Path, tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").write_text('{"prompt": "Hi", "completion": "Ho"}\n')
    (tmp_path / "recipe.yaml").write_text(f"model: {base}\ndata: {{train: {tmp_path}/records.jsonl}}\n")
    assert qlora("check", tmp_path / "recipe.yaml").code == 0
    shards(base)[0].write_text(POINTER)
    result = qlora("check", tmp_path / "recipe.yaml", "--json")
    assert result.code == 2 and "git lfs pull" in json.loads(result.out)["problems"][0]["message"]


def test_a_template_file_comes_before_the_one_in_the_tokenizer_config(base: Path, tmp_path: Path) -> None:
    """torchforge PR#509, as transformers does."""
    config = json.loads((base / "tokenizer_config.json").read_text())
    old = "{% for message in messages %}OLD {{ message.content }}{% endfor %}"
    (base / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": old}))
    (base / "chat_template.jinja").write_text(CHATML)
    (tmp_path / "records.jsonl").write_text('{"prompt": "Hi", "completion": "Ho"}\n')
    (tmp_path / "recipe.yaml").write_text(f"model: {base}\ndata: {{train: {tmp_path}/records.jsonl}}\n")
    [example] = qlora("preview", tmp_path / "recipe.yaml", "--json").json["rows"]
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    text = byte_tokenizer().apply_chat_template(turns, tokenize=False)
    assert "".join(segment["text"] for segment in example["segments"]) == text
