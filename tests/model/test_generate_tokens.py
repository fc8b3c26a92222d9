"""Batched generation: token for token what each prompt gets alone, with an adapter per row; ends, samples, warnings."""

import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from support.adapted_models import load_base, randomize_adapter
from support.architecture_table import PACKED, UNPACKED
from support.architectures import random_model, save_architecture
from support.expert_models import EXPERTS, randomize_updates

from qlora.adapters.expert_targets import adaptable
from qlora.adapters.inject import inject
from qlora.adapters.lora import Lora
from qlora.adapters.switch import AdapterSwitch
from qlora.model.generate_tokens import BATCH_TOKENS, RowHooks, _batches, _Sampler, generate, stream_tokens
from qlora.model.kv_cache import NAMES, WHOLE_PROMPTS, CachedModel, takes_padding
from qlora.model.load_base import Base
from qlora.model.module_tree import set_by_path

Zoo = Callable[..., Path]
NEW_TOKENS = 6
# gemma3 and mistral have a window of 32 tokens, qwen3_5_text recurrent layers, the last two experts.
KINDS = ("llama", "gemma3", "mistral", "qwen2", "granite", "qwen3_5_text", "qwen2_moe", "gpt_oss")
LENGTHS = (3, 61, 17, 17, 40, 2, 29, 8)


def prompts_of(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [draw.integers(40, 250, length).tolist() for length in lengths]


@pytest.fixture
def model_folder(zoo: Zoo, expert_zoo: Zoo, tmp_path: Path) -> Callable[[str], Path]:
    def folder(kind: str) -> Path:
        if kind == "qwen3_5_text":
            return save_architecture(tmp_path / kind, kind, 10**7)
        return expert_zoo(kind) if kind in EXPERTS else zoo(kind)

    return folder


def switch_of(base: Base) -> AdapterSwitch:
    """A switch with two random adapters of other ranks; one of them has experts where the model does."""
    switch = AdapterSwitch(base.model)
    frozen = adaptable(base.model)
    for name, expert_rank in (("a", 1), ("b", 0)):
        inject(base.model, Lora(4 if name == "a" else 2, 8.0, 0.0, expert_rank=expert_rank), "all-linear", ord(name))
        randomize_adapter(base.model) if name == "b" else randomize_updates(base.model)
        layers = {path: base.model.get_submodule(path) for path in frozen}
        layers = {path: layer for path, layer in layers.items() if layer is not frozen[path]}
        for path, layer in frozen.items():
            set_by_path(base.model, path, layer)
        switch.add(name, layers)
    return switch


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.sample(of=6)
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_adapters_answers_as_each_prompt_alone(kind: str, model_folder: Callable[[str], Path]) -> None:
    base = load_base(model_folder(kind))
    switch, prompts = switch_of(base), prompts_of()
    names = [None, "a", "b", "a", None, "b", "b", "a"]
    with switch.per_row(names) as rows:
        together = generate(base, prompts, NEW_TOKENS, hooks=RowHooks(select=rows.select))
    for name, prompt, answer in zip(names, prompts, together, strict=True):
        switch.activate(name)
        assert [*stream_tokens(base, prompt, NEW_TOKENS)] == answer
    with switch.disable():
        assert generate(base, prompts, NEW_TOKENS) != together


@torch.no_grad()
def recomputed(model: Any, prompt: Sequence[int]) -> list[int]:
    ids = [*prompt]
    for _ in range(NEW_TOKENS):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", ["llama", "bloom", "mamba", "recurrent_gemma"])  # the last one without a cache
def test_a_cache_changes_no_token(kind: str) -> None:
    model = random_model(kind)
    base: Any = SimpleNamespace(model=model, stop_token_ids=(), device=torch.device("cpu"))
    prompts = prompts_of((9, 4, 9))
    assert takes_padding(model) == (kind == "llama")
    assert generate(base, prompts, NEW_TOKENS) == [recomputed(model, prompt) for prompt in prompts]
    cached = CachedModel(model)
    cached.start(prompts[:1])
    assert (cached._cache is None) == (kind == "recurrent_gemma")


WHOLE = (
    "mamba2",
    "qwen3_5_text",
    "bart",
    "bloom",
    *sorted(WHOLE_PROMPTS),
)  # classes that compute a prompt in one forward
IN_PIECES = ("llama", "gemma2", "gemma3_text", "gpt_oss", "phi3", "cohere2", "gpt_neo", "opt")
UNCACHED = ("dory", "qwen3_5", "xlstm")  # their tiny models do not run with padding or a cache
OTHERS = sorted({*PACKED, *UNPACKED} - {*WHOLE, *IN_PIECES, *UNCACHED})
OF_5_24 = pytest.mark.skipif(Version(transformers.__version__) < Version("5.24"), reason="older releases lack classes")


@torch.no_grad()
@pytest.mark.sample(of=6)
@pytest.mark.parametrize(
    "kind", [*WHOLE, *IN_PIECES, *(pytest.param(kind, marks=[pytest.mark.slow, OF_5_24]) for kind in OTHERS)]
)
@pytest.mark.parametrize("rows", [1, 4])
def test_a_prompt_in_pieces_has_the_logits_of_the_whole(kind: str, rows: int) -> None:
    """Padding fills whole pieces of the shorter rows. A class that can't continue computes the prompt at once."""
    model, prompts = random_model(kind), prompts_of((61, 40, 12, 37)[:rows])
    whole, parts = CachedModel(model), CachedModel(model, prefill_scores=rows * 61 * 40)
    tokens = [[50 + step] * rows for step in range(3)]
    expected, logits = ([part.start(prompts), *map(part.append, tokens)] for part in (whole, parts))
    assert kind in OTHERS or (len(whole._pieces()), len(parts._pieces()) > 1) == (1, kind not in WHOLE)
    torch.testing.assert_close(torch.stack(logits), torch.stack(expected), rtol=0, atol=1e-4 * float(expected[0].std()))


def test_a_batch_has_few_prompts_that_are_long() -> None:
    lengths = [BATCH_TOKENS * 2, 10, BATCH_TOKENS // 2, BATCH_TOKENS // 2, *[20] * 17]
    assert [len(batch) for batch in _batches(lengths, True)] == [16, 2, 2, 1]
    assert sorted(index for batch in _batches(lengths, True) for index in batch) == [*range(21)]
    assert [len(batch) for batch in _batches(lengths, False)] == [1, 16, 1, 2, 1]


def test_a_row_leaves_the_batch_when_it_ends(zoo: Zoo) -> None:
    base, prompts = load_base(zoo("llama")), prompts_of()
    whole = generate(base, prompts, NEW_TOKENS)
    stops = (whole[0][2], whole[1][3])
    selected: list[Sequence[int]] = []
    reports: list[tuple[int, int]] = []
    hooks = RowHooks(lambda done, total: reports.append((done, total)), selected.append)
    ending: Any = SimpleNamespace(model=base.model, stop_token_ids=stops, device=base.device)
    answers = generate(ending, prompts, NEW_TOKENS, hooks=hooks)
    for answer, full in zip(answers, whole, strict=True):
        end = next((place for place, token in enumerate(full) if token in stops), NEW_TOKENS)
        assert answer == full[: end + 1]
    assert len(selected) > 1 and [len(rows) for rows in selected] == sorted((len(r) for r in selected), reverse=True)
    assert reports == [(8, 8)]
    until = generate(base, prompts, NEW_TOKENS, hooks=RowHooks(is_complete=lambda row, ids: len(ids) > row))
    assert until == [full[: row + 1] for row, full in enumerate(whole)]
    assert generate(base, prompts, 0) == [[]] * 8


def test_a_sample_depends_on_the_seed_and_its_prompt_alone(zoo: Zoo) -> None:
    base, prompts = load_base(zoo("llama")), prompts_of()
    before = torch.get_rng_state()
    together = generate(base, [*prompts, prompts[0]], NEW_TOKENS, 1.0, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert together[:8] == [generate(base, [prompt], NEW_TOKENS, 1.0, seed=3)[0] for prompt in prompts]
    assert together[1] == [*stream_tokens(base, prompts[1], NEW_TOKENS, 1.0, seed=3)]
    assert together[8] != together[0]  # the second time it is another sample
    assert together[:8] != generate(base, prompts, NEW_TOKENS, 1.0, seed=4)
    pair = generate(base, [prompts[0]] * 2, NEW_TOKENS, 1.0, seed=3, hooks=RowHooks(groups=("a", "b")))
    assert pair[0] == pair[1] == together[0]


def test_samples_have_the_probabilities_of_the_softmax() -> None:
    logits, count = torch.tensor([[0.0, -torch.inf, 1.0, 2.0]]).repeat(4000, 1), 4000
    draws = {row: random.Random(row) for row in range(count)}
    counts = Counter(_Sampler(2.0, draws).tokens(logits, range(count)))
    expected = (logits[0] / 2.0).softmax(0)
    for token, probability in enumerate(expected.tolist()):
        assert abs(counts[token] / count - probability) < 0.03
    assert counts[1] == 0


def test_every_class_names_its_cache_as_expected() -> None:
    """A version of transformers with another name would compute every token again, without an error."""
    for kind in ("llama", "gemma3_text", "mamba2", "qwen3_5_text"):
        assert CachedModel(random_model(kind))._cache_name in NAMES
