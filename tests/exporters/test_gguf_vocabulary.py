"""Tokenizers in GGUF: a file's own ids are those of the tokenizer, unknown split expressions are refused by name."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tokenizers import CORPUS, make_tokenizer
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from qlora.errors import InputError, QloraError
from qlora.exporters.gguf.file_tokenizer import FileTokenizer
from qlora.exporters.gguf.gguf import general_name
from qlora.exporters.gguf.gguf_certificate import TEMPLATE, compare_file_prompts
from qlora.exporters.gguf.gguf_file import GgufFile, PlannedGguf, Value, write_gguf
from qlora.exporters.gguf.split_expressions import DIGITS, GPT2, LLAMA3, QWEN2, SINGLE_DIGITS, TEKKEN, find_split_rule
from qlora.exporters.gguf.vocabulary import NO_MERGES, build_vocabulary
from qlora.exporters.served_conversations import ServedConversation

TEXTS = [
    *CORPUS[:3],
    "  two  blanks 12345\n\n\tend ",
    "don't WE'LL x²y",
    "naïve café 你好 🚀\u200d",
    "a\u00a0b\r\n<x> </s >",
    "",
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


def byte_level(expression: str, ignore_merges: bool = False) -> Any:
    """A tokenizer of this split, trained on a few texts."""
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    split = pre_tokenizers.Split(Regex(expression), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<s>", "<|im_start|>", "<|im_end|>"]
    backend.train_from_iterator(
        [*CORPUS, *TEXTS] * 2,
        trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, special_tokens=special, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>")


def file_of(tokenizer: Any, path: Path, keys: Mapping[str, Value] | None = None) -> Path:
    vocabulary = build_vocabulary(tokenizer, len(tokenizer) + 3, [tokenizer.eos_token_id], CHATML)
    metadata = {key: value for key, value in {**vocabulary.metadata, **(keys or {})}.items() if value != ""}
    write_gguf(path, "llama", metadata, [PlannedGguf("x.weight", (1, 1), "float32", lambda: torch.zeros(1, 1))])
    return path


@pytest.mark.parametrize(
    ("expression", "ignores", "name"),
    [
        (GPT2, False, "gpt-2"),
        (LLAMA3, True, "llama-bpe"),
        (LLAMA3, False, "smaug-bpe"),
        (QWEN2, False, "qwen2"),
        (TEKKEN, True, "tekken"),
    ],
)
def test_a_file_of_a_known_split_has_the_tokenizers_ids(
    expression: str, ignores: bool, name: str, tmp_path: Path
) -> None:
    tokenizer = byte_level(expression, ignores)
    file = GgufFile(file_of(tokenizer, tmp_path / "model.gguf"))
    assert file.get("tokenizer.ggml.pre") == name
    own = FileTokenizer(file)
    for text in [*TEXTS, "<|im_start|>user\n hi<|im_end|>"]:
        assert own.encode_prompt(text) == tokenizer(text)["input_ids"], text
    assert own.tokens[-1].startswith("[PAD")  # rows of the embedding that no token has


@pytest.mark.parametrize("kind", ["pieces", "gemma_like"])
def test_a_file_of_sentence_pieces_has_the_tokenizers_ids(kind: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(kind, "phi")
    file = GgufFile(file_of(tokenizer, tmp_path / "model.gguf"))
    own = FileTokenizer(file)
    assert file.get("tokenizer.ggml.model") == "llama"
    assert own.adds_bos
    assert file.get("tokenizer.ggml.add_space_prefix") is (kind == "pieces")
    for text in [*TEXTS[:-1], "<|user|>\n hi<|end|>there"]:
        assert own.encode_prompt(text) == tokenizer(text)["input_ids"], text
    assert own.encode_prompt(f"<s>{TEXTS[0]}") == tokenizer(TEXTS[0])["input_ids"]  # its BOS is not doubled


def test_tokens_have_the_types_and_roles_of_llama_cpp() -> None:
    tokenizer = byte_level(QWEN2)
    tokenizer.add_tokens(["<note>"])
    start, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>"))
    metadata = build_vocabulary(tokenizer, len(tokenizer) + 1, [start, end], CHATML).metadata
    types = metadata["tokenizer.ggml.token_type"]
    assert [types[number] for number in (end, len(tokenizer) - 1, len(tokenizer), 9)] == [3, 4, 5, 1]  # type: ignore[index]
    assert metadata["tokenizer.ggml.eos_token_id"] == end  # the tokenizer's own first
    assert metadata["tokenizer.ggml.eot_token_id"] == start and "tokenizer.ggml.eom_token_id" not in metadata
    assert metadata["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id


def test_a_tokenizer_without_a_form_is_refused_by_name() -> None:
    for tokenizer, reason in (
        (make_tokenizer("bytes"), r"no name for this tokenizer's split expression, '\\\\p\{L\}"),
        (make_tokenizer("unigram"), "a tokenizer of kind Unigram"),
    ):
        with pytest.raises(InputError, match=f"{reason}.*--llama-cpp DIR"):
            build_vocabulary(tokenizer, 500, [], None)
    with pytest.raises(InputError, match="the embedding 5 rows"):
        build_vocabulary(byte_level(GPT2), 5, [], None)


def test_single_digits_are_a_known_split_without_tokens_of_white_space() -> None:
    backend: dict[str, Any] = json.loads(byte_level(SINGLE_DIGITS).backend_tokenizer.to_str())
    backend["model"]["vocab"] = {"a": 0, "\u0120": 1, "\u0120a": 2}
    assert find_split_rule(backend).name == "smollm"
    backend["model"]["vocab"]["\u0120\u0120"] = 3
    with pytest.raises(InputError, match="no name for this tokenizer's split expression"):
        find_split_rule(backend)
    backend["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "add_prefix_space": False}]}  # fmt: skip
    assert find_split_rule(backend).steps == (DIGITS, GPT2)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({}, ""),
        ({TEMPLATE: ""}, "no chat template"),
        ({TEMPLATE: CHATML.replace("user", "x").replace("assistant", "bot")}, "from token"),
        ({TEMPLATE: "{{ bos_token }}{{ bos_token }}" + CHATML, "tokenizer.ggml.add_bos_token": True}, "from token"),
        ({"tokenizer.ggml.add_bos_token": True}, "from token 0"),
        ({"tokenizer.ggml.pre": "gpt-2"}, "from token"),
        ({"tokenizer.ggml.merges": [NO_MERGES]}, "from token"),
    ],
)
def test_prompts_of_a_file_are_compared_with_those_of_training(
    keys: Mapping[str, Value], reason: str, tmp_path: Path
) -> None:
    tokenizer = byte_level(QWEN2)
    turns = [{"role": "user", "content": "Hello there,  how are 1234 you?\n\nThat is right."}]
    text = tokenizer.apply_chat_template(turns, chat_template=CHATML, tokenize=False)
    trained = [ServedConversation("one", turns, tokenizer(text)["input_ids"])]
    result = compare_file_prompts(file_of(tokenizer, tmp_path / "model.gguf", keys), tokenizer, trained)
    assert (result.equal == 1) == (reason == "")
    assert reason in result.different


def test_a_file_without_tokens_is_refused(tmp_path: Path) -> None:
    path = file_of(byte_level(GPT2), tmp_path / "model.gguf", {"tokenizer.ggml.tokens": ""})
    with pytest.raises(QloraError, match=r"tokenizer\.ggml\.tokens is missing"):
        FileTokenizer(GgufFile(path))


def test_the_name_in_a_file_strips_blanks_only_where_the_tokenizer_does() -> None:
    phi = ("<unk>", "<s>", "</s>", "<|endoftext|>")
    assert general_name("microsoft/Phi-3-mini", True, phi) == "Phi-3-mini"
    assert general_name("my-base", True, phi) == "my-base (Phi-3)"
    assert general_name("/data/Phi-3-mini", False, phi) == "phi 3-mini"
    with pytest.raises(InputError, match="drops blanks"):
        general_name("my-base", True, phi[:2])
