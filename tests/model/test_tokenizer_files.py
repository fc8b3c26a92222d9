"""A tokenizer with new tokens: the base's files byte for byte but for them, and read as the tokenizer of training."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.tokenizers import make_tokenizer
from transformers import AutoTokenizer

from qlora.errors import BaseModelError
from qlora.model.new_tokens import add_tokens
from qlora.model.tokenizer_files import (
    ADDED,
    CONFIG,
    DECODER,
    PIECES,
    VOCABULARY,
    add_to_files,
    unlisted_tokens,
    write_tokenizer,
)

NEW = ["<|ask|>", "two words"]
TEXTS = ["Hello <|ask|>there two words\n<s> x", "<|ask|>", "two words two"]


def base_of(folder: Path, kind: str, form: str) -> Path:
    """Files of a tokenizer as transformers 5 writes them, or in the older form, with sentencepiece's file beside."""
    tokenizer = make_tokenizer(kind, "chatml")
    tokenizer.save_pretrained(folder)
    if form == "old":
        config = json.loads((folder / CONFIG).read_text())
        decoder = {
            str(number): {"content": token.content, "special": token.special, "lstrip": False, "rstrip": False}
            | {"single_word": False, "normalized": token.normalized}
            for number, token in tokenizer.added_tokens_decoder.items()
        }
        old = {"tokenizer_class": "PreTrainedTokenizerFast", DECODER: decoder, "legacy": True}
        (folder / CONFIG).write_text(json.dumps(config | old, indent=2))
        (folder / "special_tokens_map.json").write_text('{"bos_token":  "<s>"}')
        (folder / PIECES).write_bytes(b"pieces")
    return folder


@pytest.mark.parametrize("kind", ["bytes", "pieces", "gemma_like"])
@pytest.mark.parametrize("form", ["new", "old"])
def test_new_tokens_are_patched_in(kind: str, form: str, tmp_path: Path) -> None:
    base, out = base_of(tmp_path / "base", kind, form), tmp_path / "out"
    out.mkdir()
    extended = AutoTokenizer.from_pretrained(base)
    known = len(extended)
    ids = add_tokens(extended, NEW, known)
    names = write_tokenizer(out, base, extended)
    assert {file.name for file in base.iterdir() if file.is_file()} <= {*names}
    for name in {*names} - {VOCABULARY, ADDED, *([CONFIG] if form == "old" else [])}:
        assert (out / name).read_bytes() == (base / name).read_bytes(), name
    before, after = (json.loads((folder / VOCABULARY).read_text()) for folder in (base, out))
    assert after["added_tokens"][: len(before["added_tokens"])] == before["added_tokens"]
    assert after | {"added_tokens": 0} == before | {"added_tokens": 0}
    if form == "old":
        assert json.loads((out / ADDED).read_text()).items() >= dict(zip(NEW, ids, strict=True)).items()
        before, after = (json.loads((folder / CONFIG).read_text()) for folder in (base, out))
        assert {*after[DECODER]} - {*before[DECODER]} == {*map(str, ids)}
        assert after | {DECODER: 0} == before | {DECODER: 0}
    read = AutoTokenizer.from_pretrained(out)
    assert read.backend_tokenizer.to_str() == extended.backend_tokenizer.to_str()
    assert [read(text)["input_ids"] for text in TEXTS] == [extended(text)["input_ids"] for text in TEXTS]


def test_tokens_that_sentencepiece_lacks_are_those_beside_the_vocabulary(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "gemma_like", "new")
    assert {"\n\n", "<|im_start|>"} <= unlisted_tokens(base).keys()
    assert not {"<s>", "<unk>"} & unlisted_tokens(base).keys()


@pytest.mark.parametrize("content", ["[]", "{", "nothing"])
def test_a_damaged_file_is_named(content: str, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "bytes", "new")
    extended: Any = AutoTokenizer.from_pretrained(base)
    known = len(extended)
    add_tokens(extended, NEW, known)
    (base / ADDED).write_text(content)
    tokens = {number: token for number, token in extended.added_tokens_decoder.items() if number >= known}
    with pytest.raises(BaseModelError, match=r"added_tokens\.json"):
        add_to_files(base, tokens, extended)
