"""Public reports about data files, rebuilt in small: the record of each line is the text that its author wrote."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tokenizers import make_tokenizer
from tokenizers import AddedToken

from qlora.data import Data, Source
from qlora.data.conversations.encoder import Encoder
from qlora.data.prepare import prepare
from qlora.data.reading import source
from qlora.data.reading.resolve_paths import resolve_source
from qlora.data.types import IGNORED, BadRecord, Message
from qlora.errors import DataError

BOM = b"\xef\xbb\xbf"
LINE_ENDS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"  # of str.splitlines, not of JSON Lines


def records_of(path: Path, content: bytes) -> list[Any]:
    """The fields of each record in a file; the message of a bad one."""
    path.write_bytes(content)
    section = Source(path=str(path))
    records = source.read_records(section, resolve_source(section), (0, 0))
    return [item.message if isinstance(item, BadRecord) else dict(item.fields) for item in records]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n"), max_size=8)), max_size=4)
)
def test_any_text_of_a_json_line_is_read_back(rows: list[tuple[str]], tmp_path_factory: pytest.TempPathFactory) -> None:
    """datasets PR#3910, tau PR#354: U+2028 and its kin end no line. datasets#8241: a byte order mark is skipped."""
    fields = [{"prompt": f"{text}{LINE_ENDS}", "completion": text} for (text,) in rows] or [{"prompt": "a"}]
    lines = "\n".join(json.dumps(item, ensure_ascii=False) for item in fields).encode()
    array = json.dumps(fields, ensure_ascii=False).encode()
    folder = tmp_path_factory.mktemp("lines")
    for mark in (b"", BOM):
        assert records_of(folder / "a.jsonl", mark + lines) == fields
        assert records_of(folder / "a.jsonl", mark + lines.replace(b"\n", b"\r\n") + b"\r\n") == fields
        assert records_of(folder / "a.json", mark + array) == fields


def test_a_paragraph_of_a_text_file_keeps_its_line_separators(tmp_path: Path) -> None:
    """datasets PR#3910."""
    assert records_of(tmp_path / "a.txt", f"One{LINE_ENDS}two\n\nThree".encode()) == [
        {"text": f"One{LINE_ENDS}two"},
        {"text": "Three"},
    ]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_cells_are_the_texts_that_they_are(delimiter: str, tmp_path: Path) -> None:
    """unsloth PR#10813: a blank cell is no `None`, 4.50 no 4.5; datasets#4467: `null` and NA are words.

    asreview#302: spreadsheets separate by semicolons where a comma is decimal.
    """
    cells = [["Add", "", "4.50"], ["Say", "null", "NA"], ["Say it", "nan", "007"], ["a,b;c\td", "x", "1e5"]]
    names = ["instruction", "input", "output"]
    lines = [delimiter.join(names), *(delimiter.join(f'"{cell}"' for cell in row) for row in cells)]
    path = tmp_path / ("a.tsv" if delimiter == "\t" else "a.csv")
    content = "\r\n".join(lines).encode()
    for mark in (b"", BOM):
        assert records_of(path, mark + content) == [dict(zip(names, row, strict=True)) for row in cells]


def test_a_blank_cell_adds_nothing_to_the_question(tmp_path: Path) -> None:
    """unsloth PR#10813. A blank answer is no answer."""
    path = tmp_path / "a.csv"
    path.write_text("instruction,input,output\nAdd,,1\nSay,,\n")
    encoder = Encoder(make_tokenizer("bytes", "chatml"))
    prepared = prepare(Data.model_validate({"train": str(path), "eval_fraction": 0}), encoder, 0)
    assert encoder.decode(prepared.train[0].input_ids).startswith("<|im_start|>user\nAdd<|im_end|>")
    assert prepared.report.dropped == {"empty answer": 1}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "latin-1"])
def test_another_encoding_is_named_once(encoding: str, name: str, tmp_path: Path) -> None:
    """minimind#551; Windows shells redirect into UTF-16."""
    text = "prompt,completion\nHi,Größe\n" if name == "a.csv" else '{"prompt": "Hi", "completion": "Größe"}\n'
    content = ("\ufeff" if encoding == "utf-16-be" else "") + text
    if encoding == "latin-1":
        [problem] = records_of(tmp_path / name, content.encode(encoding))
        assert problem.startswith("not UTF-8: at byte")
        return
    with pytest.raises(
        DataError, match=rf"{name}: found UTF-16 or UTF-32 text, allowed: UTF-8. Save the file as UTF-8"
    ):
        records_of(tmp_path / name, content.encode(encoding))


def test_a_template_that_wants_a_question_trains_all_answers_after_one(tmp_path: Path) -> None:
    """verl#7378: Qwen3.5's template raises for a conversation without a question, which each single message is."""
    template = (
        "{%- if not (messages | selectattr('role', 'equalto', 'user') | list) -%}"
        "{{ raise_exception('No user query found in messages.') }}{%- endif -%}"
        "{%- for m in messages -%}{%- if m.role == 'system' and not loop.first -%}"
        "{{ raise_exception('System message must be at the beginning.') }}{%- endif -%}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
    )
    assert trained(template, tmp_path, "system", "user", "assistant", "user", "assistant") == ["2.", "4."]
    assert trained(template, tmp_path, "assistant", "user", "assistant") == ["2."]


def test_a_prompt_that_ends_unlike_the_answers_begin_loses_no_record(tmp_path: Path) -> None:
    """Nemotron PR#329: a line break after the generation prompt that no answer has before it."""
    template = (
        "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n\n' }}{%- endif -%}"
    )
    assert trained(template, tmp_path, "user", "assistant", "user", "assistant") == ["1.", "3."]


def trained(template: str, folder: Path, *roles: str) -> list[str]:
    """The trained answers of a conversation; message N has the content `N.`."""
    (folder / "template.jinja").write_text(template)
    encoder = Encoder(make_tokenizer("bytes", "chatml"), "assistant", str(folder / "template.jinja"))
    example = encoder.encode("x:1", [Message(role, f"{number}.") for number, role in enumerate(roles)])
    return encoder.decode(example.labels[example.labels != IGNORED]).split("<|im_end|>")[:-1]


@pytest.mark.parametrize("content", ["Ho", "  Ho  ", "Ho\n", "\tHo", "\n\nHo"])
@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_control_tokens_that_take_white_space_give_the_template_ids(content: str, kind: str) -> None:
    """transformers#30590: the white space after Phi-3's control tokens is part of them."""
    tokenizer = make_tokenizer.__wrapped__(kind, "phi")
    names = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False, rstrip=True) for name in names])
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": content}] * 2
    encoder = Encoder(tokenizer)
    example = encoder.encode("x:1", [Message(turn["role"], turn["content"]) for turn in turns])
    expected = tokenizer.apply_chat_template(turns, return_dict=False)
    first = len(encoder.tokenizer.prefix_ids)  # added before every conversation
    assert example.input_ids[first:].tolist() == expected
    assert (example.labels == tokenizer.convert_tokens_to_ids("<|end|>")).sum() == 2
    prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
    assert encoder.prompt_ids([Message("user", content)])[first:] == prompt == expected[: len(prompt)]


def test_an_answer_that_starts_with_a_line_break_follows_the_prompt(tmp_path: Path) -> None:
    """prime-rl PR#1103: its first token is not merged with the prompt's last, which generation sees as it is."""
    encoder = Encoder(make_tokenizer("bytes", "chatml"))
    example = encoder.encode("x:1", [Message("user", "Hi"), Message("assistant", "\n\nHo")])
    prompt = encoder.prompt_ids([Message("user", "Hi")])
    assert example.input_ids[: len(prompt)].tolist() == prompt and (example.labels[: len(prompt)] == IGNORED).all()
    assert encoder.decode(example.labels[example.labels != IGNORED]) == "\n\nHo<|im_end|>"
