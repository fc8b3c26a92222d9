"""The Modelfile renders conversations as the chat template does, or names why it can't."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from support.command_line import qlora
from support.ollama_templates import (
    INNER_BLANKS,
    NUMBERED,
    TRANSLATABLE,
    UPPER_CASE,
    conversations,
    stripped,
    template_of,
)
from support.small_runs import recipe_of, run, write_records
from transformers import AutoModelForCausalLM

from qlora.adapters.peft_files import AdapterFile
from qlora.data.types import RecordError
from qlora.exporters.export_source import ExportSource
from qlora.exporters.go_template import GoTemplate, translate
from qlora.exporters.message_affixes import Untranslatable
from qlora.exporters.ollama import build_modelfile
from qlora.quant import Quant, build_quantizer

Zoo = Callable[..., Path]
TURNS = [("user", "one two"), ("assistant", "three"), ("user", "four\nfive"), ("assistant", "six"), ("user", "seven")]


def render_go(translation: GoTemplate, turns: Sequence[dict[str, str]]) -> str:
    """What Go's text/template makes of the subset in use: text, a range, a chain of ifs, the system in a question.

    tests/clients/test_go_templates.py executes Go itself.
    """
    text, turns = translation.text, [*turns]
    if translation.system and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": translation.system}, *turns]
    system = turns[0]["content"] if turns[0]["role"] == "system" else ""
    opening, body, prompt = re.fullmatch(
        r"(?:\{\{ if not \.System \}\}(.*?)\{\{ end \}\})?"
        r"\{\{ range [^}]*\.Messages \}\}(.*)\{\{ end \}\}\{\{ end \}\}(.*)",
        text, re.S,
    ).groups()  # fmt: skip
    body = re.sub(
        r"\{\{ if and \$\.System \(eq \$i 1\) \}\}(.*?)\{\{ end \}\}",
        lambda match: f"\0{match[1]}\1".replace("{{ $.System }}", "\2"), body, flags=re.S,
    )  # fmt: skip
    branches = dict(re.findall(r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}(.*?)(?=\{\{ else if|\Z)', body, re.S))
    rendered = "" if system or not opening else opening
    for index, turn in enumerate(turns):
        branch = branches.get(turn["role"], "").replace('{{ "{{" }}', "{{")
        inside = r"\g<1>" if system and index == 1 else ""
        branch = re.sub("\0(.*?)\1", inside, branch, flags=re.S).replace("\2", system)
        rendered += branch.replace("{{ .Content }}", turn["content"])
    return rendered + prompt.replace('{{ "{{" }}', "{{")


@pytest.mark.parametrize("name", TRANSLATABLE)
def test_a_conversation_is_rendered_as_in_training(name: str) -> None:
    template = template_of(TRANSLATABLE[name])
    translation = translate(template)
    compared = 0
    for turns in conversations():
        if any("{{" in turn["content"] for turn in turns):
            continue  # Go prints it as it is; this small imitation does not
        try:
            expected = template.render(turns, prompt=True)
        except RecordError:  # a template without system messages
            continue
        assert render_go(translation, stripped(turns, translation.trimmed)) == expected.removeprefix(template.bos)
        compared += 1
    assert compared >= 3
    assert translation.system == ("You are kind." if name == "default system" else "")
    assert bool(translation.trimmed) == ("| trim" in TRANSLATABLE[name])


def test_braces_of_a_template_are_text_in_go() -> None:
    message = "{% for m in messages %}{{ '{{' }}{{ m.role }}{{ '}}' }} {{ m.content }}\n{% endfor %}"
    prompt = "{% if add_generation_prompt %}{{ '{{assistant}} ' }}{% endif %}"
    translation = translate(template_of(message + prompt))
    assert translation.text.endswith('{{ "{{" }}assistant}} ') and translation.text.count('{{ "{{" }}') == 4


@pytest.mark.parametrize("text", [NUMBERED, UPPER_CASE, INNER_BLANKS])
def test_other_templates_are_refused(text: str) -> None:
    with pytest.raises(Untranslatable):
        translate(template_of(text))


@pytest.mark.parametrize("adds_bos", [True, False])
def test_the_template_begins_with_bos_where_ollama_adds_none(zoo: Zoo, adds_bos: bool) -> None:
    source = source_of(zoo("llama"), TRANSLATABLE["llama3"])
    modelfile = build_modelfile(source, ".", adds_bos)
    assert modelfile.count("<s>") == (0 if adds_bos else 1)
    assert ('TEMPLATE """<s>{{ if not .System }}' in modelfile) != adds_bos
    assert "stripped blanks and line ends around messages of the system and user and assistant" in modelfile
    assert modelfile.endswith('PARAMETER stop "</s>"\nPARAMETER stop "<\\"end\\">"\n')


def source_of(base: Path, template: str) -> ExportSource:
    """A source of which the Modelfile reads the template and the end tokens only."""
    no_adapter = AdapterFile(base, {}, {}, None)
    quantizer, cpu = build_quantizer(Quant(kind="dense")), torch.device("cpu")
    return ExportSource(
        no_adapter,
        base,
        quantizer,
        {},
        torch.float32,
        cpu,
        torch.nn.Identity(),
        None,
        {},
        template_of(template),
        ("</s>", '<"end">'),
    )


def test_the_folder_is_a_gguf_file_and_its_modelfile(zoo: Zoo, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    data = write_records(tmp_path / "records.jsonl", 8)
    run(recipe_of(zoo("llama"), data, tmp_path / "run", "train.max_steps=2", "data.eval_fraction=0.25"))
    result = qlora("export", tmp_path / "run", tmp_path / "out", "--to", "ollama", "--json")
    assert result.json["agreement"]["top1"] == 1.0 and "ollama create" in result.err
    modelfile = (tmp_path / "out" / "Modelfile").read_text()
    assert modelfile.startswith('FROM ./model.gguf\nTEMPLATE """{{ range .Messages }}')
    assert 'PARAMETER stop "</s>"\n' in modelfile
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"Modelfile", "model.gguf", "certificate.json", "README.md"}
    rows = {row["name"]: row for row in result.json["servers"]}
    assert rows["Ollama"]["loads"] and rows["llama.cpp"]["command"].endswith("out/model.gguf")


def test_without_a_gguf_form_the_folder_is_the_merged_model(zoo: Zoo, tmp_path: Path) -> None:
    data = write_records(tmp_path / "records.jsonl", 8)
    run(recipe_of(zoo("mistral"), data, tmp_path / "run", "train.max_steps=2", "data.eval_fraction=0.25"))
    result = qlora("export", tmp_path / "run", tmp_path / "out", "--to", "ollama", "--json")
    assert result.json["agreement"]["top1"] == 1.0 and "which Ollama imports for few architectures" in result.err
    modelfile = (tmp_path / "out" / "Modelfile").read_text()
    assert modelfile.startswith("# No GGUF file: ") and "\nFROM .\nTEMPLATE" in modelfile
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "progress.json" not in names and {"certificate.json", "README.md", "config.json", "tokenizer.json"} <= names
