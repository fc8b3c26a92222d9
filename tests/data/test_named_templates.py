"""Named chat templates are chosen as transformers chooses them; notes and errors about templates name the remedy."""

import json
from itertools import combinations
from pathlib import Path

import pytest
from support.command_line import qlora
from support.tiny_models import byte_tokenizer
from support.tokenizers import make_tokenizer
from support.tool_templates import TEMPLATES

from qlora.data.conversations.build_example import Encoded
from qlora.data.conversations.encode_records import read_messages
from qlora.data.conversations.encoder import Encoder
from qlora.data.types import IGNORED, Message, Record, RecordError
from qlora.errors import DataError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NEEDS_TOOLS = "{{ '# ' ~ tools | length ~ '\n' }}" + TEMPLATES["object"]  # refuses a conversation without tools
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
NAMES = ("default", "tool_use", "rag", "none")
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


def encoder_of(templates: object, chat_template: str = "auto") -> Encoder:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = templates
    return Encoder(tokenizer, "assistant", chat_template)


def text_of(encoder: Encoder, **fields: object) -> str:
    return encoder.decode(
        encoder.encode("x:1", read_messages(Record("x:1", {"messages": TURNS, **fields}), "auto")).input_ids
    )


@pytest.mark.parametrize("tool_use", [TEMPLATES["object"], NEEDS_TOOLS], ids=["lenient", "strict"])
def test_records_with_tools_are_rendered_with_tool_use(tool_use: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": CHATML, "tool_use": tool_use}
    encoder = Encoder(tokenizer)
    for fields in ({"tools": TOOLS}, {}):
        expected = tokenizer.apply_chat_template(TURNS, tools=fields.get("tools"), tokenize=False)
        assert text_of(encoder, **fields) == expected
    prompt = encoder.prompt_ids(read_messages(Record("x:1", {"messages": TURNS, "tools": TOOLS}), "auto")[:-1])
    expected = tokenizer.apply_chat_template(TURNS[:1], tools=TOOLS, add_generation_prompt=True, tokenize=False)
    assert encoder.decode(prompt) == expected
    names = [note.split(" are rendered")[0] for note in encoder.notes if "rendered" in note]
    assert names == ["conversations", "conversations with tools"]


@pytest.mark.parametrize("names", [names for size in (1, 2, 3, 4) for names in combinations(NAMES, size)], ids="+".join)
def test_any_set_of_names_is_chosen_from_as_by_transformers(names: tuple[str, ...]) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {name: f"{name} {TEMPLATES['object']}" for name in names}
    if "default" not in names:
        with pytest.raises(DataError, match="none is named default"):
            Encoder(tokenizer)
        return
    encoder = Encoder(tokenizer)
    for fields in ({"tools": TOOLS}, {}):
        expected = tokenizer.apply_chat_template(TURNS, tools=fields.get("tools"), tokenize=False)
        assert text_of(encoder, **fields) == expected


def test_a_template_is_chosen_by_its_name() -> None:
    templates = {"chat": CHATML, "rag": "rag " + CHATML, "default": "default " + CHATML}
    assert text_of(encoder_of(templates, "rag")).startswith("rag <|im_start|>")
    assert text_of(encoder_of(templates)).startswith("default <|im_start|>")
    assert "'rag'" in encoder_of(templates, "rag").notes[0]
    with pytest.raises(DataError, match=r"no file nope.*name of a template of the model: chat, default, rag"):
        encoder_of(templates, "nope")


def test_one_named_tool_use_serves_records_with_tools_alone() -> None:
    encoder = encoder_of({"tool_use": NEEDS_TOOLS, "chat": CHATML}, "tool_use")
    assert text_of(encoder, tools=TOOLS).startswith("# 1\n")
    with pytest.raises(RecordError, match="refused by the chat template"):
        text_of(encoder)


@pytest.mark.parametrize("names", [("chat", "rag"), ("tool_use", "rag"), ("chat",)])
def test_without_a_default_the_command_ends_with_the_names(names: tuple, tmp_path: Path, zoo: object) -> None:
    import shutil

    model = shutil.copytree(zoo("llama"), tmp_path / "model")  # type: ignore[operator]
    for path in model.glob("*chat_template*"):
        path.unlink()
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = dict.fromkeys(names, CHATML)
    tokenizer.save_pretrained(model)
    (tmp_path / "records.jsonl").write_text(json.dumps({"messages": TURNS}))
    (tmp_path / "r.yaml").write_text(f"model: {model}\ndata: {{train: {tmp_path}/records.jsonl}}\n")
    checked = qlora("check", tmp_path / "r.yaml")
    assert checked.code == 2 and "bug in qlora" not in checked.err
    assert "model.chat_template" in checked.err and all(name in checked.err for name in names)
    assert qlora("preview", tmp_path / "r.yaml", f"model.chat_template={names[0]}", "--json").json["rows"]


def test_a_header_that_is_trained_is_a_note(tmp_path: Path) -> None:
    without_prompt = CHATML.split("{% if")[0]
    encoder = encoder_of(without_prompt)
    assert any("no generation prompt" in note and "'<|im_start|>assistant'" in note for note in encoder.notes)
    example = encoder.encode("x:1", [Message("user", "Hi"), Message("assistant", "Ho")])
    assert encoder.decode(example.labels[example.labels != IGNORED]) == "<|im_start|>assistant\nHo<|im_end|>"
    assert not any("no generation prompt" in note for note in encoder_of(CHATML).notes)
    for template, kind in (
        ("mistral", "pieces"),
        ("phi", "pieces"),
        ("qwen3", "bytes"),
        ("forced_thinking", "bytes_bos"),
    ):
        assert not any("no generation prompt" in note for note in Encoder(make_tokenizer(kind, template)).notes)


def test_an_answer_that_the_template_cuts_names_the_remedy() -> None:
    encoder = Encoder(make_tokenizer("bytes_bos", "forced_thinking"))
    with pytest.raises(
        RecordError, match=r"drops part of an answer: 'Write `</think>.*Name a template .* in model.chat_template"
    ):
        encoder.encode("x:1", [Message("user", "Hi"), Message("assistant", "Write `</think>` there.")])
    thought = [Message("user", "Hi"), Message("assistant", "<think>hm</think>Ho")]
    result = encoder.encode_batch([("x:1", thought)])[0]
    assert isinstance(result, Encoded) and (result.answers.thoughts, result.answers.trained_thoughts) == (1, 0)


def test_an_answer_alone_names_the_format_for_plain_text() -> None:
    with pytest.raises(RecordError, match=r"no prompt: the only message is the assistant's. As plain text it is"):
        encoder_of(CHATML).encode("x:1", [Message("assistant", "Ho")])
