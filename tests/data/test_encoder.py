"""The encoder, for every template: the answers and their end tokens are trained, nothing else."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.paths import TEMPLATES
from support.tokenizers import END_TOKENS, FAMILIES, make_tokenizer, template_text, without_whitespace

from qlora.data.conversations.chat_template import PLAIN, TemplateOptions
from qlora.data.conversations.encoder import Encoder
from qlora.data.prefix_tree import paths_of
from qlora.data.types import IGNORED, Example, Message, RecordError
from qlora.errors import DataError

TRAINED_BLOCKS = TemplateOptions(masks_empty_thinking=False)  # of thoughts: the law without an exception
EACH_FAMILY = pytest.mark.parametrize(("template", "kind"), FAMILIES, ids=lambda value: value)


@cache
def build_encoder(template: str, kind: str, train_on: str = "assistant") -> Encoder:
    return Encoder(make_tokenizer(kind, template), train_on, options=TRAINED_BLOCKS)


def dialog(*contents: str, system: str = "") -> list[Message]:
    turns = [Message(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]
    return [Message("system", system), *turns] if system else turns


def trained_runs(encoder: Encoder, example: Example) -> list[str]:
    """The text of each run of consecutive trained tokens of each path, shortest path first."""
    runs, run = list[str](), list[int]()
    for path in paths_of(example):
        for token, label in zip([*path.input_ids, -1], [*path.labels, IGNORED], strict=True):
            if label != IGNORED:
                run.append(token)
            elif run:
                runs.append(encoder.decode(run))
                run = []
    return runs


words = st.text(
    st.one_of(
        st.sampled_from("abcd 12,.?!\n"),
        st.characters(codec="utf-8", exclude_categories=["Cs", "Cc", "Co", "Zs"], exclude_characters="▁"),
    ),
    min_size=1,
    max_size=24,
).filter(lambda text: text.strip())
Pairs = list[tuple[str, str]]
# A thought that is opened and not closed is refused (test_thoughts.py); hypothesis knows the tags from the code.
without_thoughts = words.filter(lambda text: "<th" not in text and "</th" not in text)
conversations = st.lists(st.tuples(without_thoughts, without_thoughts), min_size=1, max_size=4)


@EACH_FAMILY
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=conversations)
def test_the_trained_tokens_are_the_answers_and_their_end_tokens(template: str, kind: str, pairs: Pairs) -> None:
    encoder = build_encoder(template, kind)
    encoded = encoder.encode_batch([("x:1", dialog(*[text for pair in pairs for text in pair]))])[0]
    assert not isinstance(encoded, RecordError), encoded
    answers = [answer for _, answer in pairs]
    if template == "qwen3":  # a later question removes the block before an earlier answer: each is a branch
        answers = [f"<think></think>{answer}" for answer in answers]
    runs = trained_runs(encoder, encoded.example)
    if encoded.unknown_tokens:  # the small unigram vocabulary has no piece for some characters
        assert len(runs) == len(answers)
    else:
        expected = [without_whitespace(answer) + END_TOKENS[template] for answer in answers]
        assert sorted(without_whitespace(run) for run in runs) == sorted(expected)
    assert encoded.end_trained and not encoded.untrained_answers


@EACH_FAMILY
@settings(max_examples=10, deadline=None)
@given(pairs=conversations)
def test_training_ids_are_prompt_ids_and_then_the_answer(template: str, kind: str, pairs: Pairs) -> None:
    encoder = build_encoder(template, kind)
    turns = dialog(*[text for pair in pairs for text in pair])
    example = encoder.encode("x:1", turns)
    prompt = encoder.prompt_ids(turns[:-1])
    path = next(path for path in paths_of(example) if path.input_ids[: len(prompt)].tolist() == prompt)
    assert path.labels[len(prompt)] != IGNORED
    assert (path.labels[: len(prompt)] == IGNORED).all() or len(pairs) > 1


@EACH_FAMILY
def test_pieces_have_the_ids_of_the_whole_rendering(template: str, kind: str) -> None:
    """A path has the ids that the tokenizer gives for the whole text."""
    tokenizer, encoder = make_tokenizer(kind, template), build_encoder(template, kind)
    turns = dialog("How are you?", "Fine, the dog says.", "And now?", "Still fine.")
    rendered = encoder.template.render([{"role": m.role, "content": m.content} for m in turns])
    expected = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    if encoder.tokenizer.adds_bos and expected[0] != tokenizer.bos_token_id:
        expected = [tokenizer.bos_token_id, *expected]
    paths = [path.input_ids.tolist() for path in paths_of(encoder.encode("x:1", turns))]
    assert expected in paths or expected[:-1] in paths  # qwen3's last line break is in no path


@EACH_FAMILY
@pytest.mark.parametrize("first", ["Hi", "<s>Hi", " <s> <s>Hi"])
def test_the_bos_token_is_added_as_often_as_by_the_tokenizer(template: str, kind: str, first: str) -> None:
    tokenizer, encoder = make_tokenizer(kind, template), build_encoder(template, kind)
    expected = tokenizer("Hi")["input_ids"].count(tokenizer.bos_token_id)
    example = encoder.encode("x:1", dialog(first, "Good day."))
    assert example.input_ids.tolist().count(tokenizer.bos_token_id) == expected
    assert not expected or example.input_ids[0] == tokenizer.bos_token_id


@EACH_FAMILY
def test_a_record_cannot_forge_a_control_token(template: str, kind: str) -> None:
    tokenizer, encoder = make_tokenizer(kind, template), build_encoder(template, kind)
    control_strings = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    honest = encoder.encode("x:1", dialog("Hi there", "Good day."))
    control_ids = [tokenizer.convert_tokens_to_ids(text) for text in control_strings]
    for text in control_strings:
        encoded = encoder.encode_batch([("x:2", dialog(f"Hi {text} there{text}", f"Good {text}day."))])[0]
        assert encoded.control_strings == (text, text, text)
        for token in control_ids:
            if token != tokenizer.unk_token_id:
                assert (encoded.example.input_ids == token).sum() == (honest.input_ids == token).sum(), text
        if not encoded.unknown_tokens:
            decoded = without_whitespace(encoder.decode(encoded.example.input_ids))
            assert without_whitespace(f"Good {text}day.") in decoded


def test_an_answer_keeps_its_think_tokens() -> None:
    encoder = build_encoder("qwen3", "bytes")
    tokenizer = make_tokenizer("bytes", "qwen3")
    encoded = encoder.encode_batch([("x:1", dialog("What?", "<think>\nhm\n</think>\n\nThis."))])[0]
    assert not encoded.control_strings
    assert trained_runs(encoder, encoded.example) == ["<think>\nhm\n</think>\n\nThis.<|im_end|>"]
    assert (encoded.example.input_ids == tokenizer.convert_tokens_to_ids("<think>")).sum() == 1
    in_question = encoder.encode_batch([("x:2", dialog("Say <think>", "No."))])[0]
    assert in_question.control_strings == ("<think>",)


def test_train_false_on_a_message_and_train_on_last_and_all() -> None:
    turns = dialog("a", "one", "b", "two")
    first_untrained = [turns[0], Message("assistant", "one", train=False), *turns[2:]]
    encoders = {on: build_encoder("chatml", "bytes", on) for on in ("assistant", "last", "all")}
    runs = {on: trained_runs(encoder, encoder.encode("x:1", turns)) for on, encoder in encoders.items()}
    assert runs["assistant"] == ["one<|im_end|>", "two<|im_end|>"]
    assert runs["last"] == ["two<|im_end|>"]
    assert len(runs["all"]) == 1 and runs["all"][0].endswith("two<|im_end|>\n")
    encoder = encoders["assistant"]
    assert trained_runs(encoder, encoder.encode("x:1", first_untrained)) == ["two<|im_end|>"]
    ids = [encoder.encode("x:1", turns).input_ids.tolist() for encoder in encoders.values()]
    assert ids[0] == ids[1] == ids[2]  # the loss mask never changes the ids


def test_an_answer_that_differs_from_the_prompt_is_trained_from_there() -> None:
    encoder = build_encoder("forced_thinking", "bytes_bos")
    example = encoder.encode("x:1", dialog("Hi", "Good day."))
    assert trained_runs(encoder, example) == ["Good day.</s>"]
    assert any("prompt differs" in note for note in encoder.notes)
    with pytest.raises(RecordError, match="drops part of an answer"):
        encoder.encode("x:1", dialog("Hi", "a thought</think>Good day."))


def test_a_thought_that_the_prompt_opens_is_trained_from_its_start(tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_text(
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|><think>' }}{% endif %}"
    )
    encoder = Encoder(make_tokenizer("bytes", "phi"), "assistant", str(path))
    turns = dialog("Say hm", "<think>hm</think>Good day.")
    example = encoder.encode("x:1", turns)
    assert trained_runs(encoder, example) == ["hm</think>Good day.</s>"]
    assert example.input_ids[: len(encoder.prompt_ids(turns[:1]))].tolist() == encoder.prompt_ids(turns[:1])


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([Message("user", "Hi")], "no assistant turn"),
        ([Message("user", "Hi"), Message("assistant", "x", train=False)], "nothing to train"),
        ([Message("assistant", "Hi")], "no prompt"),
        ([Message("assistant", "Hi"), Message("user", "Ho")], "prefix not kept"),
        ([Message("user", "Hi"), Message("assistant", "Ho")] * 300, "too many turns"),
    ],
)
def test_a_record_without_an_answer_to_train_is_refused(turns: list[Message], reason: str) -> None:
    with pytest.raises(RecordError) as error:
        build_encoder("chatml", "bytes").encode("x:1", turns)
    assert error.value.reason == reason


def test_a_template_may_refuse_one_record_and_render_the_next() -> None:
    encoder = build_encoder("gemma", "gemma_like")
    good, bad = dialog("Hi", "Good day."), [*dialog("Hi", "Good day."), Message("assistant", "Well.")]
    results = encoder.encode_batch([("x:1", good), ("x:2", bad), ("x:3", good)])
    assert [isinstance(result, RecordError) for result in results] == [False, True, False]
    assert results[1].reason == "refused by the chat template"
    assert "turns must alternate" in results[1].detail


def test_a_batch_of_records_is_encoded_as_each_alone() -> None:
    encoder = build_encoder("mistral", "pieces")
    items = [(f"x:{i}", dialog(f"Question {i}", f"Answer {i}", *(["More", "Yes"] if i % 3 else []))) for i in range(20)]
    for (where, turns), encoded in zip(items, encoder.encode_batch(items), strict=True):
        alone = encoder.encode(where, turns)
        assert np.array_equal(alone.input_ids, encoded.example.input_ids)
        assert np.array_equal(alone.labels, encoded.example.labels)


@pytest.mark.parametrize("kind", ["bytes", "bytes_bos", "pieces", "unigram"])
def test_all_of_a_text_is_trained_with_special_tokens_and_an_end_token(kind: str) -> None:
    tokenizer, encoder = make_tokenizer(kind), build_encoder("plain", kind)
    example = encoder.encode("x:1", [Message("text", "the dog sings")])
    ids = tokenizer("the dog sings")["input_ids"]
    expected = ids if ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]
    assert example.input_ids.tolist() == expected
    assert example.trained_tokens() == len(expected) - 1  # the first token is not predicted
    assert encoder.prompt_ids([Message("text", "the dog sings")]) == expected[: len(ids)] or kind == "unigram"


def test_a_record_that_is_tokenized_already_is_unchanged() -> None:
    encoder = build_encoder("chatml", "bytes")
    extra = {"input_ids": np.array([5, 6, 7], np.int32), "labels": np.array([-100, 6, 7], np.int32)}
    example = encoder.encode("x:1", [Message("tokens", "", extra=extra)])
    assert example.input_ids.tolist() == [5, 6, 7] and example.labels.tolist() == [-100, 6, 7]
    for wrong in ({"input_ids": np.array([5, 10**6], np.int32)}, {"labels": np.array([5, -100, -100], np.int32)}):
        with pytest.raises(RecordError):
            encoder.encode("x:1", [Message("tokens", "", extra={**extra, **wrong})])


def test_tools_and_tool_calls_are_rendered_and_trained() -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    turns = [
        Message("tools", "", extra={"tools": [{"type": "function", "function": {"name": "weather"}}]}),
        *dialog("Weather?", system="Help."),
        Message("assistant", "", extra={"tool_calls": [call]}),
        Message("tool", "rain"),
        Message("assistant", "It rains."),
    ]
    encoder = build_encoder("qwen3", "bytes")
    example = encoder.encode("x:1", turns)
    text = encoder.decode(example.input_ids)
    assert "# Tools" in text and "<tool_response>\nrain" in text
    runs = trained_runs(encoder, example)
    assert runs[-1].endswith("It rains.<|im_end|>")
    forged = [Message("tools", "", extra={"tools": [{"name": "weather", "description": "<|im_end|>"}]}), *turns[1:]]
    assert encoder.encode_batch([("x:2", forged)])[0].control_strings == ("<|im_end|>",)
    for messages, match in ((turns, "does not write tools"), (turns[1:], "does not write tool calls")):
        with pytest.raises(RecordError, match=match):
            build_encoder("chatml", "bytes").encode("x:1", messages)


def test_a_model_without_a_template_gets_the_plain_one_and_a_note() -> None:
    encoder = build_encoder("plain", "bytes")
    assert encoder.template.text == PLAIN and "plain" in encoder.notes[0]
    assert build_encoder("chatml", "bytes").template.text != PLAIN


def test_a_template_without_an_end_token_gets_one_after_the_last_answer() -> None:
    encoder = Encoder(make_tokenizer("bytes"), "assistant", str(TEMPLATES / "chatml.jinja"))
    turns = dialog("a", "one", "b", "two")
    example = encoder.encode("x:1", turns)
    assert trained_runs(encoder, example) == ["one<|im_end|>", "two<|im_end|></s>"]
    assert example.input_ids[-1] == make_tokenizer("bytes").eos_token_id
    prompt = encoder.prompt_ids(turns[:-1])
    assert example.input_ids[: len(prompt)].tolist() == prompt


HOSTILE = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "blows up": "{{ 'a' * 4000000000 }}",
    "grows": "{% set s = namespace(x='a' * 16) %}{% for a in range(60) %}{% set s.x = s.x ~ s.x %}{% endfor %}",
    "is verbose": "{{ lipsum(n=20000) }}",
    "pads": "{{ 'a' | center(3000000000) }}",
    "formats": "{{ '%2000000000d' % 1 }}",
    "renders nothing": "nothing",
    "breaks": "{% for message in messages %}",
    "raises": "{{ raise_exception('no') }}",
    "escapes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "imports": "{% import 'os' as os %}{{ os }}",
    "nests": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "omits answers": "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
}


@pytest.mark.sample(of=6)
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_refused_in_time(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.jinja").write_text(HOSTILE[name])
    with pytest.raises(DataError, match="template"):
        Encoder(make_tokenizer("bytes"), "assistant", str(tmp_path / "a.jinja"))


def test_the_date_in_a_template_is_the_same_every_day() -> None:
    assert "strftime_now" in template_text("llama3")
    encoder = build_encoder("llama3", "bytes_bos")
    assert "26 Jul 2024" in encoder.decode(encoder.encode("x:1", dialog("Hi", "Good day.")).input_ids)
