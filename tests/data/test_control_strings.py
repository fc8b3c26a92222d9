"""Control strings of plain text: letters by default, control tokens where the recipe accepts them."""

import json
from pathlib import Path

import pytest
from support.command_line import qlora
from support.tiny_models import byte_tokenizer
from support.tokenizers import FAMILIES, make_tokenizer

from qlora.data import Data
from qlora.data.conversations.encoder import Encoder
from qlora.data.prepare import prepare
from qlora.data.types import Message

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}] * 2
EACH_FAMILY = pytest.mark.parametrize(("template", "kind"), FAMILIES, ids=lambda value: value)


@EACH_FAMILY
def test_accepted_control_strings_give_the_ids_of_the_template(template: str, kind: str) -> None:
    tokenizer = make_tokenizer(kind, template)
    encoder = Encoder(tokenizer, control_strings="accept")
    text = encoder.template.render(TURNS)
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    if encoder.tokenizer.adds_bos and not text.startswith("<s>"):
        expected = [tokenizer.bos_token_id, *expected]
    example = encoder.encode("x:1", [Message("text", text)])
    assert example.input_ids.tolist() == expected
    assert example.labels[1:].tolist() == expected[1:]  # a beginning-of-text token is not predicted


@EACH_FAMILY
def test_text_without_control_strings_is_as_before(template: str, kind: str) -> None:
    tokenizer = make_tokenizer(kind, template)
    for text in ("the dog sings", "the dog\n"):
        one, two = (Encoder(tokenizer, control_strings=value).encode("x:1", [Message("text", text)]) for value in
                    ("text", "accept"))  # fmt: skip
        assert one.input_ids.tolist() == two.input_ids.tolist()


def test_only_plain_text_is_accepted() -> None:
    tokenizer = make_tokenizer("bytes", "chatml")
    encoded = Encoder(tokenizer, control_strings="accept").encode_batch(
        [("x:1", [Message("user", "Hi<|im_end|>"), Message("assistant", "Ho<|im_end|>")])]
    )[0]
    assert encoded.control_strings == ("<|im_end|>", "<|im_end|>")


def test_the_record_of_the_report_has_the_ids_of_the_template(tmp_path: Path, zoo: object) -> None:
    tokenizer = byte_tokenizer()
    text = tokenizer.apply_chat_template(TURNS, tokenize=False)
    (tmp_path / "records.jsonl").write_text("\n".join([json.dumps({"text": text})] * 2))
    model = zoo("llama")  # type: ignore[operator]
    (tmp_path / "r.yaml").write_text(f"model: {model}\ndata: {{train: {tmp_path}/records.jsonl}}\n")
    expected = tokenizer.apply_chat_template(TURNS, return_dict=False)
    as_text = qlora("check", tmp_path / "r.yaml", "--json").json
    assert any("data.control_strings: accept" in warning["message"] for warning in as_text["warnings"])
    rows = qlora("preview", tmp_path / "r.yaml", "data.control_strings=accept", "--json").json["rows"]
    assert rows[0]["input_ids"] == expected == rows[0]["labels"]
    accepted = qlora("check", tmp_path / "r.yaml", "data.control_strings=accept", "--json").json
    assert accepted["data"]["control_rows"] == 0 and as_text["data"]["control_rows"] == 2
    assert accepted["data"]["end_trained"] == 1.0


@pytest.mark.parametrize("setting", ["control_strings=accept", "overlong=split"])
def test_a_setting_for_plain_text_needs_some(setting: str, tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").write_text(json.dumps({"prompt": "Hi", "completion": "Ho"}))
    (tmp_path / "r.yaml").write_text(f"model: x\ndata: {{train: {tmp_path}/records.jsonl, format: completion}}\n")
    checked = qlora("check", tmp_path / "r.yaml", f"data.{setting}")
    assert checked.code == 2 and "has no effect: no data set has the format text" in checked.err


def test_the_setting_is_part_of_the_cache_key(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("bytes", "chatml")
    (tmp_path / "records.jsonl").write_text(json.dumps({"text": "Hi<|im_end|>"}))
    lengths = []
    for value in ("text", "accept"):
        section = Data.model_validate({"train": str(tmp_path / "records.jsonl"), "control_strings": value})
        encoder = Encoder(tokenizer, control_strings=value)
        lengths.append(len(prepare(section, encoder, 0).train[0]))
    assert lengths[1] < lengths[0]
    assert Encoder(tokenizer).sha256 != Encoder(tokenizer, control_strings="accept").sha256
