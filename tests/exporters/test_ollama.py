"""The Modelfile renders conversations as the chat template does, or names why it can't."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from support.command_line import qlora
from support.small_runs import recipe_of, run, write_records
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
TRANSLATABLE = {
    "chatml": CHATML, "llama3": LLAMA3, "gemma": GEMMA, "default system": DEFAULT_SYSTEM, "braces": BRACES,
    "plain": PLAIN,
}  # fmt: skip
NUMBERED = "{% for m in messages %}{{ loop.index }}. {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
UPPER_CASE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | upper }}\n{% endfor %}"
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}{% set system = '<<SYS>>' + "
    "messages[0]['content'] + '<</SYS>>' %}{% else %}{% set turns = messages %}{% set system = '' %}{% endif %}"
    "{% for m in turns %}{% if m['role'] == 'user' %}{{ '[INST] ' + (system if loop.first else '') + m['content'] + "
    "' [/INST]' }}{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
TURNS = [("user", "one two"), ("assistant", "three"), ("user", "four\nfive"), ("assistant", "six"), ("user", "seven")]


def template_of(text: str) -> Template:
    return Template(byte_tokenizer(text), "auto")


def render_go(text: str, system: str, turns: Sequence[tuple[str, str]]) -> str:
    """What Go's text/template makes of the subset in use: literal text, a range, a chain of ifs."""
    body, prompt = re.fullmatch(r"\{\{ range \.Messages \}\}(.*)\{\{ end \}\}\{\{ end \}\}(.*)", text, re.S).groups()
    branches = dict(re.findall(r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}(.*?)(?=\{\{ else if|\Z)', body, re.S))
    if system and turns[0][0] != "system":
        turns = [("system", system), *turns]
    rendered = "".join(branches[role].replace("{{ .Content }}", content) for role, content in turns)
    return (rendered + prompt).replace('{{ "{{" }}', "{{")


@pytest.mark.parametrize("name", TRANSLATABLE)
def test_a_conversation_is_rendered_as_in_training(name: str) -> None:
    template = template_of(TRANSLATABLE[name])
    translation = translate(template)
    conversations = [TURNS[:1], TURNS[:3], TURNS]
    conversations += [[("system", "be brief"), *turns] for turns in conversations] if name != "gemma" else []
    for turns in conversations:
        expected = template.render([{"role": role, "content": content} for role, content in turns], prompt=True)
        assert render_go(translation.text, translation.system, turns) == expected.removeprefix(template.bos)
    assert translation.system == ("You are kind." if name == "default system" else "")


@pytest.mark.parametrize("text", [NUMBERED, UPPER_CASE, LLAMA2])
def test_other_templates_are_refused(text: str) -> None:
    with pytest.raises(Untranslatable):
        translate(template_of(text))


def test_the_folder_is_the_merged_model_and_its_modelfile(zoo: Zoo, tmp_path: Path) -> None:
    data = write_records(tmp_path / "records.jsonl", 8)
    run(recipe_of(zoo("llama-tied-bias"), data, tmp_path / "run", "train.max_steps=2", "data.eval_fraction=0.25"))
    result = qlora("export", tmp_path / "run", tmp_path / "out", "--to", "ollama", "--json")
    assert result.json["agreement"]["top1"] == 1.0 and "ollama create" in result.err
    modelfile = (tmp_path / "out" / "Modelfile").read_text()
    assert modelfile.startswith('FROM .\nTEMPLATE """{{ range .Messages }}') and 'PARAMETER stop "</s>"\n' in modelfile
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "progress.json" not in names and {"certificate.json", "README.md", "config.json", "tokenizer.json"} <= names
