"""The preview of a conversation whose past the template rewrites: shared tokens once, branches, answers, thoughts."""

import json
from collections.abc import Callable
from pathlib import Path

from support.paths import TEMPLATES
from support.tokenizers import make_tokenizer

from qlora.data.conversations.encoder import Encoder
from qlora.data.preview import as_json
from qlora.data.types import Message

TURNS = [Message("user", "One?"), Message("assistant", "Two.", extra={"thinking": "First."}), Message("user", "Three?"),
         Message("assistant", "<think>Second.</think>Four.")]  # fmt: skip


def test_each_answer_is_shown_with_its_context_and_thoughts_apart() -> None:
    encoder = Encoder(make_tokenizer("bytes", "qwen3"))
    shown = as_json(encoder.encode("x:1", TURNS), encoder)
    json.dumps(shown)
    assert "".join(part["text"] for part in shown["segments"]) == encoder.decode(shown["input_ids"])
    trained = [(part["text"], part["thought"], part["branch"]) for part in shown["segments"] if part["trained"]]
    assert trained == [
        ("<think>\nSecond.\n</think>", True, 0), ("\n\nFour.<|im_end|>", False, 0),
        ("<think>\nFirst.\n</think>", True, 1), ("\n\nTwo.<|im_end|>", False, 1)]  # fmt: skip
    first, second = shown["answers"]
    assert first["context_ids"] == encoder.prompt_ids(TURNS[:1]) and first["role"] == "assistant"
    assert second["context_ids"] == encoder.prompt_ids(TURNS[:3])
    assert encoder.decode(first["trained_ids"]) == "<think>\nFirst.\n</think>\n\nTwo.<|im_end|>"
    ((start, parent),) = shown["branches"]
    assert shown["input_ids"][start:] == first["trained_ids"] and parent + 1 == len(first["context_ids"])


def test_a_text_sees_its_first_token() -> None:
    encoder = Encoder(make_tokenizer("bytes"))
    shown = as_json(encoder.encode("x:1", [Message("text", "the dog sings")]), encoder)
    (answer,) = shown["answers"]
    assert answer["context_ids"] + answer["trained_ids"] == shown["input_ids"] and len(answer["context_ids"]) == 1


def test_the_screen_names_each_branch(tmp_path: Path, zoo: Callable) -> None:
    from support.command_line import qlora

    turns = [{"role": m.role, "content": m.content, **m.extra} for m in TURNS]
    (tmp_path / "records.jsonl").write_text(json.dumps({"messages": turns}))
    model = f"{{name: {zoo('llama')}, chat_template: {TEMPLATES / 'qwen3.jinja'}}}"
    (tmp_path / "r.yaml").write_text(f"model: {model}\ndata: {{train: {tmp_path}/records.jsonl}}\n")
    shown = qlora("preview", tmp_path / "r.yaml")
    assert shown.code == 0 and "[[<think>\nSecond.\n</think>]]" in shown.err
    before, after = shown.err.split("branch 1 (token ")
    assert " follows the first " in after and "[[<think>\nFirst.\n</think>]]" in after and "First." not in before
    checked = qlora("check", tmp_path / "r.yaml")
    assert "answers trained: 2 of 2 · thoughts trained: 2 of 2" in checked.err
