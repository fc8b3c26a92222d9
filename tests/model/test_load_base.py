"""The base is loaded as transformers loads it, tensor by tensor, and its fingerprint depends on its weights only."""

import ctypes
import gc
import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.child_processes import Child, Notify
from support.tiny_models import FAMILIES
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora.model import Model
from qlora.model.checkpoint_fingerprint import checkpoint_sha256
from qlora.model.linear_layers import linear_paths
from qlora.model.load_base import Base, load
from qlora.quant import Quant, build_quantizer
from qlora.quant.dense import Dense
from qlora.quant.linear import FrozenLinear

CPU = torch.device("cpu")
IDS = torch.randint(5, 250, (2, 40), generator=torch.Generator().manual_seed(0))
Zoo = Callable[..., Path]
SINGLE = "model.safetensors"


def load_dense(folder: Path, dtype: str = "auto") -> Base:
    return load(Model(name=str(folder), dtype=dtype), Dense(), CPU)


def sha256_of(folder: Path) -> str:
    return load_dense(folder).manifest.sha256


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


def copy_with(folder: Path, target: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """A copy of a model folder with other tensors in its one file."""
    shutil.copytree(folder, target)
    tensors = load_file(folder / SINGLE)
    changed = change(tensors)
    save_file(tensors if changed is None else changed, target / SINGLE, metadata={"format": "pt"})
    return target


@pytest.mark.sample(of=4)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_loaded_as_transformers_loads_it(zoo: Zoo, family: str, dtype: str) -> None:
    base = load_dense(zoo(family), dtype)
    assert checkpoint_sha256(zoo(family)) == base.manifest.sha256
    reference = AutoModelForCausalLM.from_pretrained(zoo(family), dtype=getattr(torch, dtype)).eval()
    assert base.manifest.ignored == () and base.manifest.dtype == dtype
    assert torch.equal(logits(base.model), logits(reference))
    expected = dict(reference.named_buffers())
    buffers = dict(base.model.named_buffers())
    assert buffers.keys() == expected.keys() and all(torch.equal(buffers[name], expected[name]) for name in expected)


@pytest.mark.sample(of=3)
@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_the_linear_layers_of_the_decoder_are_quantized(zoo: Zoo, family: str) -> None:
    base = load(Model(name=str(zoo(family))), build_quantizer(Quant()), CPU)
    reference = AutoModelForCausalLM.from_pretrained(zoo(family))
    expected = [p for p, m in reference.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in p]
    paths = [path for path, module in base.model.named_modules() if isinstance(module, FrozenLinear)]
    assert paths == expected == list(base.manifest.quantized) == linear_paths(reference)
    for path in paths:
        bias = reference.get_submodule(path).bias
        frozen = base.model.get_submodule(path).bias
        assert (frozen is None and bias is None) or torch.equal(frozen, bias)
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


@pytest.mark.parametrize("family", ["llama", "llama-tied-bias", "gpt_neox"])
def test_shards_are_loaded_like_one_file(zoo: Zoo, family: str) -> None:
    one, many = load_dense(zoo(family)), load_dense(zoo(family, max_shard_size="60KB"))
    assert len(list(zoo(family, max_shard_size="60KB").glob("*.safetensors"))) > 2
    assert one.manifest.sha256 == many.manifest.sha256
    assert torch.equal(logits(one.model), logits(many.model))


def test_a_tied_head_shares_the_tensor_of_the_embedding(zoo: Zoo) -> None:
    model: Any = load_dense(zoo("llama-tied-bias")).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


# ---- fingerprint


def test_the_fingerprint_depends_on_values_not_on_files(zoo: Zoo, tmp_path: Path) -> None:
    base = zoo("llama-tied-bias", dtype=torch.bfloat16)
    other_name = Path(shutil.copytree(base, tmp_path / "renamed"))
    upcast = copy_with(base, tmp_path / "float32", lambda t: {name: value.float() for name, value in t.items()})
    with_head = copy_with(
        base, tmp_path / "head", lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()}
    )
    shards = zoo("llama-tied-bias", dtype=torch.bfloat16, max_shard_size="60KB")
    others = {"renamed": other_name, "float32": upcast, "stored head": with_head, "shards": shards}
    assert {name: sha256_of(folder) for name, folder in others.items()} == dict.fromkeys(others, sha256_of(base))


def test_one_changed_value_in_any_tensor_changes_the_fingerprint(zoo: Zoo, seed: int, tmp_path: Path) -> None:
    base = zoo("llama-tied-bias")
    digests = {checkpoint_sha256(base)}
    names = sorted(load_file(base / SINGLE))[seed % 3 :: 3]  # other ones in the next run
    for number, name in enumerate(names):

        def nudge(tensors: dict[str, Tensor], name: str = name) -> None:
            tensors[name].view(-1)[-1] += 0.25

        digests.add(checkpoint_sha256(copy_with(base, tmp_path / str(number), nudge)))
    assert len(digests) == len(names) + 1


def test_swapped_tensors_and_fewer_layers_change_the_fingerprint(zoo: Zoo, tmp_path: Path) -> None:
    base = zoo("llama")
    first, second = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    swapped = copy_with(base, tmp_path / "swapped", lambda t: t | {first: t[second], second: t[first]})
    shallow = Path(shutil.copytree(base, tmp_path / "shallow"))
    edit_config(shallow, num_hidden_layers=1)
    assert len({sha256_of(folder) for folder in (base, swapped, shallow)}) == 3


# ---- streaming

M_MMAP_THRESHOLD = -3  # of glibc's mallopt


def load_and_measure(folder: Path, notify: Notify) -> None:
    """Reports the peak of anonymous memory while a base is loaded, and the bytes of its tensors."""
    # Freed memory is returned at once, and none of the parent's is used again: resident memory is what is held.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)
    peak, before, is_loading = 0, anonymous_bytes(), True

    def watch() -> None:
        nonlocal peak
        while is_loading:
            peak = max(peak, anonymous_bytes())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    base = load(Model(name=str(folder)), build_quantizer(Quant()), CPU)
    is_loading = False
    watcher.join()
    notify(f"{peak - before} {sum(p.numel() * p.itemsize for p in base.model.parameters())}")


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_loading_holds_the_packed_tensors_and_one_more(tmp_path: Path) -> None:
    from support.tiny_models import byte_tokenizer
    from transformers import LlamaConfig

    width, intermediate, layers = 1024, 2048, 6
    config = LlamaConfig(
        vocab_size=384, hidden_size=width, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=8, dtype=torch.bfloat16, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        meta_model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    noise = torch.randn(2**20).bfloat16() / 50
    named = {name: p for name, p in meta_model.named_parameters()}
    tensors = {n: noise.repeat(-(-p.numel() // noise.numel()))[: p.numel()].reshape(p.shape) for n, p in named.items()}
    stored_bytes = sum(tensor.numel() * 2 for tensor in tensors.values())
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    config.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    child = Child(lambda notify: load_and_measure(tmp_path, notify), tmp_path / "log")
    assert child.wait() == 0, (tmp_path / "log").read_text()
    peak_bytes, packed_bytes = map(int, child.lines()[-1].split())
    largest = width * intermediate
    assert stored_bytes > 120e6 and packed_bytes < 0.3 * stored_bytes
    # One 16-bit tensor; 20 MB of slack for the scratch of a few blocks at a time in every thread.
    assert peak_bytes < packed_bytes + 2 * largest + 20e6 < 0.5 * stored_bytes


# ---- small helpers


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc here to read mappings from")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_loaded_tensor_is_a_view_of_the_mapped_file(zoo: Zoo, dtype: torch.dtype, tmp_path: Path) -> None:
    """A view of the mapped file would keep every page of it that was read in memory."""
    folder = Path(shutil.copytree(zoo("llama-tied-bias", dtype=dtype), tmp_path / "base"))
    loaded = load(Model(name=str(folder)), build_quantizer(Quant()), CPU)
    gc.collect()
    assert loaded.dtype == dtype and str(folder / SINGLE) not in Path("/proc/self/maps").read_text()
