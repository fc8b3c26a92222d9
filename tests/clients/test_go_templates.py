"""The Modelfile's TEMPLATE, executed by Go's text/template as Ollama does, renders what the chat template renders."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from support.ollama_templates import TRANSLATABLE, conversations, stripped, template_of

from qlora.data.types import RecordError
from qlora.exporters.go_template import translate

pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(shutil.which("go") is None, reason="no Go toolchain (apt install golang-go)"),
]
PROGRAM = Path(__file__).with_name("render.go")


def test_go_renders_twenty_conversations_of_each_template() -> None:
    templates = {name: template_of(text) for name, text in TRANSLATABLE.items()}
    cases, expected = [], {}
    for name, template in templates.items():
        translation = translate(template)
        rendered = []
        for turns in conversations():
            try:
                rendered.append((turns, template.render(turns, prompt=True).removeprefix(template.bos)))
            except RecordError:  # a template without system messages
                continue
        expected[name] = [text for _, text in rendered]
        sent = [stripped(turns, translation.trimmed) for turns, _ in rendered]
        cases.append({"template": translation.text, "system": translation.system, "conversations": sent})
    result = subprocess.run(
        ["go", "run", str(PROGRAM)], input=json.dumps(cases), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert dict(zip(templates, json.loads(result.stdout), strict=True)) == expected
    assert sum(len(texts) == 20 for texts in expected.values()) >= len(expected) - 1  # gemma.jinja refuses a system
