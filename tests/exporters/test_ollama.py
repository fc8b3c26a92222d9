"""The Modelfile says what the chat template says, or says that it can't."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from support.command_line import qlora
from support.small_runs import recipe_of, run, write_rows
from support.tiny_models import CHATML, byte_tokenizer
from transformers import AutoModelForCausalLM

from qlora.data.conversations.chat_template import PLAIN, Template
from qlora.exporters.go_template import Untranslatable, translate

Zoo = Callable[..., Path]
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' "
    "+ m['content'] + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are kind.<|im_end|>\n{% endif %}" + CHATML
)
BRACES = CHATML.replace("<|im_start|>", "{{ '{{' }}<|im_start|>")
SAYABLE = {"chatml": CHATML, "llama3": LLAMA3, "gemma": GEMMA, "default system": DEFAULT_SYSTEM, "braces": BRACES}
SAYABLE["plain"] = PLAIN
NUMBERED = "{% for m in messages %}{{ loop.index }}. {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
SHOUTED = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | upper }}\n{% endfor %}"
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set talk = messages[1:] %}{% set told = '<<SYS>>' + "
    "messages[0]['content'] + '<</SYS>>' %}{% else %}{% set talk = messages %}{% set told = '' %}{% endif %}"
    "{% for m in talk %}{% if m['role'] == 'user' %}{{ '[INST] ' + (told if loop.first else '') + m['content'] + "
    "' [/INST]' }}{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
TURNS = [("user", "one two"), ("assistant", "three"), ("user", "four\nfive"), ("assistant", "six"), ("user", "seven")]


def template_of(text: str) -> Template:
    return Template(byte_tokenizer(text), "auto")


def go(text: str, system: str, turns: Sequence[tuple[str, str]]) -> str:
    """What Go's text/template makes of the subset that is written: literal text, a range, a chain of ifs."""
    body, asks = re.fullmatch(r"\{\{ range \.Messages \}\}(.*)\{\{ end \}\}\{\{ end \}\}(.*)", text, re.S).groups()
    branches = dict(re.findall(r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}(.*?)(?=\{\{ else if|\Z)', body, re.S))
    if system and turns[0][0] != "system":
        turns = [("system", system), *turns]
    said = "".join(branches[role].replace("{{ .Content }}", content) for role, content in turns)
    return (said + asks).replace('{{ "{{" }}', "{{")


@pytest.mark.parametrize("kind", SAYABLE)
def test_a_conversation_is_written_as_in_training(kind: str) -> None:
    template = template_of(SAYABLE[kind])
    found = translate(template)
    talks = [TURNS[:1], TURNS[:3], TURNS]
    talks += [[("system", "be brief"), *turns] for turns in talks] if kind != "gemma" else []
    for turns in talks:
        wanted = template.render([{"role": role, "content": content} for role, content in turns], prompt=True)
        assert go(found.text, found.system, turns) == wanted.removeprefix(template.bos)
    assert found.system == ("You are kind." if kind == "default system" else "")


@pytest.mark.parametrize("text", [NUMBERED, SHOUTED, LLAMA2])
def test_what_can_not_be_said_is_not_said(text: str) -> None:
    with pytest.raises(Untranslatable):
        translate(template_of(text))


def test_the_folder_is_the_merged_model_and_its_modelfile(zoo: Zoo, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 8)
    run(recipe_of(zoo("llama-tied-bias"), data, tmp_path / "run", "train.max_steps=2", "data.eval_fraction=0.25"))
    said = qlora("export", tmp_path / "run", tmp_path / "out", "--to", "ollama", "--json")
    assert said.json["agreement"]["top1"] == 1.0 and "ollama create" in said.err
    lines = (tmp_path / "out" / "Modelfile").read_text()
    assert lines.startswith('FROM .\nTEMPLATE """{{ range .Messages }}') and 'PARAMETER stop "</s>"\n' in lines
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "progress.json" not in names and {"certificate.json", "README.md", "config.json", "tokenizer.json"} <= names
