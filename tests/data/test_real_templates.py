"""Records with tools, masks and side keys under the chat templates of released models, which the package trl ships."""

import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support.tokenizers import make_tokenizer
from transformers import PreTrainedTokenizerFast

from qlora.data.conversations.build_example import Encoded
from qlora.data.conversations.encode_records import encode_chunk
from qlora.data.conversations.encoder import Encoder
from qlora.data.types import IGNORED, Record, RecordError
from qlora.errors import DataError

SPEC = importlib.util.find_spec("trl")
FOLDER = Path(SPEC.submodule_search_locations[0] if SPEC and SPEC.submodule_search_locations else "") / "chat_templates"
FILES = sorted(path.stem for path in FOLDER.glob("*.jinja") if not path.stem.endswith("_training"))
VISION = {"idefics3", "llava_next", "smolvlm"}  # read content as parts only: refused
NO_SYSTEM = {"gemma"}
WITHOUT_CALLS = {"cohere", "cohere2", "deepseek_r1_distill", "deepseekv3", "gemma", "gemma3", "lfm2", "llama3", "phi3",
                 "phi3_5", "qwen2_5_vl"}  # fmt: skip
EACH_TEMPLATE = pytest.mark.parametrize("name", [name for name in FILES if name not in VISION])
ARGUMENTS = {"part": "bolt 7", "count": 3}
TOOL = {"type": "function", "function": {"name": "look", "description": "Look it up.", "parameters": {"type": "object",
        "properties": {"part": {"type": "string", "description": "which"},
                       "count": {"type": "integer", "description": "how many"}}, "required": ["part"]}}}  # fmt: skip


@cache
def build_encoder(name: str) -> Encoder:
    backend = make_tokenizer("bytes", "chatml").backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", bos_token="<s>", unk_token="<unk>", pad_token="<pad>"
    )
    tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return Encoder(tokenizer)


def results_of(name: str, *records: dict[str, Any]) -> list[Any]:
    return encode_chunk([Record(f"x:{i}", fields) for i, fields in enumerate(records, 1)], "auto", build_encoder(name))


def tool_record(arguments: Any) -> dict[str, Any]:
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "look", "arguments": arguments}}
    turns = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "", "tool_calls": [call]},
             {"role": "tool", "content": 'Found "12".', "name": "look", "tool_call_id": "abcdefghi"},
             {"role": "assistant", "content": "Twelve."}]  # fmt: skip
    return {"messages": turns, "tools": [TOOL]}


@pytest.mark.skipif(not FILES, reason="trl is not installed")
def test_there_are_many_templates() -> None:
    assert len(FILES) > 30 and set(FILES) >= VISION | NO_SYSTEM | WITHOUT_CALLS


@pytest.mark.sample(of=3)
@EACH_TEMPLATE
def test_arguments_as_text_and_as_object_give_the_same_ids(name: str) -> None:
    encoder = build_encoder(name)
    as_object, as_text = results_of(name, tool_record(ARGUMENTS), tool_record(json.dumps(ARGUMENTS)))
    if name in WITHOUT_CALLS:
        assert isinstance(as_object, RecordError) and isinstance(as_text, RecordError)
        assert "does not write tool" in as_object.reason
        return
    assert isinstance(as_object, Encoded) and isinstance(as_text, Encoded), (as_object, as_text)
    assert as_object.example.input_ids.tolist() == as_text.example.input_ids.tolist()
    assert as_object.unused.contents == () and set(as_object.unused.keys) <= {"tool_call_id"}
    call = encoder.decode(as_text.example.input_ids).split("Hello?")[1].split("Found")[0]
    assert all(text in call for text in ("look", "part", "bolt 7", "count", "3")) and '\\"' not in call


@pytest.mark.sample(of=3)
@EACH_TEMPLATE
def test_content_is_never_lost_and_masked_answers_bear_no_loss(name: str) -> None:
    encoder = build_encoder(name)
    turns = [{"role": "user", "content": "Ping?"}, {"role": "assistant", "content": "Wrong one.", "weight": 0},
             {"role": "user", "content": "Sure?"},
             {"role": "assistant", "content": "Good one.", "mood": "glad"}]  # fmt: skip
    plain, with_system = results_of(name, {"messages": turns}, {"messages": turns, "system": "Be brief, please."})
    for result in (plain, with_system):
        assert isinstance(result, Encoded), result
        assert bool(result.answers.merges) == (name in NO_SYSTEM and result is with_system)
        assert result.unused.contents == () and result.unused.keys == ("mood",)
        trained = encoder.decode(result.example.labels[result.example.labels != IGNORED])
        text = encoder.decode(result.example.input_ids)
        assert "Good one." in trained and "Wrong" not in trained and "Wrong one." in text and "weight" not in trained


def test_a_missing_template_file_is_named() -> None:
    with pytest.raises(DataError, match=r"no file nowhere\.jinja"):
        Encoder(make_tokenizer("bytes"), "assistant", "nowhere.jinja")
