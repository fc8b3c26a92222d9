"""The conversation of training travels with an export: template, tokens, stop tokens; checked as servers read them."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from support.small_runs import recipe_of, run, write_records
from support.tiny_models import CHATML, byte_tokenizer
from support.tokenizers import make_tokenizer, template_text
from tokenizers import processors
from transformers import AutoTokenizer

from qlora.data.conversations.chat_template import PLAIN
from qlora.data.conversations.encoder import Encoder
from qlora.data.types import Message
from qlora.errors import QloraError
from qlora.exporters import ExportRequest
from qlora.exporters.export_run import export_run
from qlora.exporters.served_conversations import (
    compare_conversations,
    fixed_probes,
    probe_conversations,
    refuse_other_prompts,
)
from qlora.exporters.served_files import ServedFiles, readable_config
from qlora.exporters.served_template import served_templates
from qlora.runs.generate import generate_from_prompts
from qlora.runs.load_run import LoadedRun, load_run

Zoo = Callable[..., Path]
OTHER = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<me>{% endif %}"
)
TURNS = [Message(("user", "assistant")[index % 2], f" {index} red\n sun ") for index in range(7)]
PROMPTS = [("", TURNS[:count]) for count in (1, 3, 7)]


@pytest.fixture(scope="module", params=["file", "plain"])
def trained(request: pytest.FixtureRequest, zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> LoadedRun:
    """A run with the template of a file, or of a base that has none."""
    folder = tmp_path_factory.mktemp("served")
    base = Path(shutil.copytree(zoo("llama"), folder / "base"))
    if request.param == "plain":
        shutil.rmtree(base / "additional_chat_templates", ignore_errors=True)
        (base / "chat_template.jinja").unlink(missing_ok=True)
        byte_tokenizer(None).save_pretrained(base)
    (folder / "other.jinja").write_text(OTHER)
    settings = [f"model.chat_template={folder / 'other.jinja'}"] if request.param == "file" else []
    data = write_records(folder / "records.jsonl", 6)
    run(recipe_of(base, data, folder / "run", "train.max_steps=1", *settings))
    return load_run(str(folder / "run"))


def test_every_export_builds_the_prompts_of_training(trained: LoadedRun, tmp_path: Path) -> None:
    expected = [row["input_ids"] for row in generate_from_prompts(trained, PROMPTS, 1, 0.0)]
    text = trained.encoder.template.text
    for target in ("merged", "adapter"):
        out = tmp_path / target
        result = export_run(trained, ExportRequest(target, rows=4), str(out))
        assert result["conversations"]["equal"] == result["conversations"]["compared"] >= 6 + 5
        assert (out / "chat_template.jinja").read_text() == text
        assert json.loads((out / "tokenizer_config.json").read_text())["chat_template"] == text
        assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2, 4]
        tokenizer = AutoTokenizer.from_pretrained(out)
        rows = [[{"role": m.role, "content": m.content} for m in messages] for _, messages in PROMPTS]
        served = [tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"] for turns in rows]
        assert served == expected
        rows_of_export = generate_from_prompts(load_run(str(out)), PROMPTS, 1, 0.0)
        assert [row["input_ids"] for row in rows_of_export] == expected


def test_a_runs_own_folder_has_its_template(trained: LoadedRun) -> None:
    assert trained.adapter
    text = (trained.adapter.folder / "chat_template.jinja").read_text()
    assert text == trained.encoder.template.text and text in (PLAIN, OTHER)


def plant(name: str, folder: Path) -> None:
    """Change a written folder as a faulty exporter would."""
    template = folder / "chat_template.jinja"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    if name == "prefix":
        template.write_text("system: be brief\n" + template.read_text())
    elif name == "missing":
        template.unlink()
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": None}))
    elif name == "bos":
        template.write_text("{{ bos_token }}" + template.read_text())
    else:
        content = json.loads((folder / "tokenizer.json").read_text())
        vocabulary = content["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.sample(of=2)
@pytest.mark.parametrize("fault", ["prefix", "missing", "bos", "tokenizer"])
def test_a_planted_fault_is_caught(runs: Any, fault: str, tmp_path: Path) -> None:
    loaded = load_run(str(runs.train("llama")))
    probes = probe_conversations(loaded)
    served = ServedFiles(
        loaded.base.folder.path, loaded.base.folder.path, None, served_templates(loaded.encoder, loaded.base.tokenizer)
    )
    served.write(tmp_path)
    sound = compare_conversations(probes, tmp_path)
    assert sound.equal == sound.compared
    plant(fault, tmp_path)
    faulty = compare_conversations(probes, tmp_path)
    assert faulty.equal < faulty.compared and faulty.different
    with pytest.raises(QloraError, match="of training"):
        refuse_other_prompts(faulty)


def test_prompts_that_no_server_builds_are_refused(zoo: Zoo, tmp_path: Path) -> None:
    base = Path(shutil.copytree(zoo("llama"), tmp_path / "base"))
    tokenizer = byte_tokenizer("{% if messages[0].role == 'system' %}{{ bos_token }}{% endif %}" + CHATML)
    bos = ("<s>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, special_tokens=[bos])
    tokenizer.save_pretrained(base)  # which puts the token before those prompts that lack it, as a server does not
    data = write_records(tmp_path / "records.jsonl", 4)
    run(recipe_of(base, data, tmp_path / "run", "train.max_steps=1"))
    loaded = load_run(str(tmp_path / "run"))
    with pytest.raises(QloraError, match="prompts have the token ids of training"):
        export_run(loaded, ExportRequest("adapter"), str(tmp_path / "adapter"))
    assert not (tmp_path / "adapter").exists()
    lines: list[str] = []
    export_run(loaded, ExportRequest("adapter", rows=0), str(tmp_path / "adapter"), lines.append)
    assert any(line.startswith("careful: chat template and tokenizer: ") for line in lines)
    assert not (tmp_path / "adapter" / "certificate.json").exists()


@pytest.mark.sample(of=3, every=("kind",))
@pytest.mark.parametrize("kind", ["bytes_bos", "pieces", "pieces_first"])
@pytest.mark.parametrize("template", ["plain", "llama3"])
def test_the_template_writes_the_first_token_where_training_puts_it(kind: str, template: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(kind, template)
    if kind == "bytes_bos":
        bos = ("<s>", tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, special_tokens=[bos])
    tokenizer.save_pretrained(tmp_path / "base")
    encoder = Encoder(tokenizer)
    probes = fixed_probes(encoder)
    assert len(probes) >= 4 and all(probe.ids[0] == tokenizer.bos_token_id for probe in probes)
    served = ServedFiles(tmp_path / "base", tmp_path / "base", None, served_templates(encoder, tokenizer))
    (tmp_path / "out").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 8}))
    served.write(tmp_path / "out")
    agreement = compare_conversations(probes, tmp_path / "out")
    assert agreement.equal == agreement.compared, agreement
    again = Encoder(AutoTokenizer.from_pretrained(tmp_path / "out"))  # as `qlora generate EXPORT` does: not doubled
    assert again.prompt_ids(TURNS[:3]) == encoder.prompt_ids(TURNS[:3])


def test_the_date_of_training_stays(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("bytes", "chatml")
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} {{ date_string }}" + template_text("chatml")
    text = served_templates(Encoder(tokenizer), tokenizer)["default"]
    turns = [{"role": "user", "content": "hi"}]
    assert "26 Jul 2024 26 Jul 2024" in tokenizer.apply_chat_template(turns, chat_template=text, tokenize=False)


@pytest.mark.parametrize("kind", ["own", "file"])
def test_named_templates_are_kept_only_beside_the_models_own(kind: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer("bytes", "chatml")
    own = template_text("chatml")
    tokenizer.chat_template = {"default": own, "tool_use": own + "{{ tools }}", "rag": own + "!"}
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 8}))
    (tmp_path / "other.jinja").write_text(own + " ")
    encoder = Encoder(tokenizer, chat_template="auto" if kind == "own" else str(tmp_path / "other.jinja"))
    served = ServedFiles(tmp_path / "base", tmp_path / "base", None, served_templates(encoder, tokenizer))
    (tmp_path / "out").mkdir()
    served.write(tmp_path / "out")
    read = AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert read == (tokenizer.chat_template if kind == "own" else own + " ")
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["chat_template"]
    listed = {item["name"]: item["template"] for item in config} if isinstance(config, list) else config
    assert listed == read


CONFIGS: list[Mapping[str, Any]] = [
    {
        "tokenizer_class": "TokenizersBackend",
        "extra_special_tokens": ["<a>"],
        "is_local": True,
        "local_files_only": False,
    },
    {"tokenizer_class": "LlamaTokenizer", "additional_special_tokens": ["<a>"], "add_bos_token": True},
]


def test_a_tokenizer_config_is_written_in_words_that_transformers_4_reads() -> None:
    assert readable_config(CONFIGS[0]) == {
        "tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<a>"]
    }  # fmt: skip
    assert readable_config(CONFIGS[1]) == CONFIGS[1]


def test_prompts_of_several_turns_are_tokenized_as_the_rendered_text() -> None:
    merging = make_tokenizer("bytes", "plain")  # its pieces cross the ends of messages
    merging.chat_template = "{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}"
    merging.chat_template += "{% if add_generation_prompt %}assistant:{% endif %}"
    for probe in fixed_probes(Encoder(merging)):
        text = merging.apply_chat_template(probe.turns, add_generation_prompt=True, tokenize=False)
        assert merging(text, add_special_tokens=False)["input_ids"] == probe.ids
