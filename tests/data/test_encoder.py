"""What the encoder promises for any template: the assistant's words and the end of turn are trained, nothing else."""

from functools import cache

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.tokenizers import ENDS, FAMILIES, template_text, tokenizer_of

from qlora.data.conversations.encoder import Encoder
from qlora.data.types import IGNORED, Message, RecordError
from qlora.errors import DataError

EACH_FAMILY = pytest.mark.parametrize(("template", "kind"), FAMILIES, ids=lambda value: value)


@cache
def encoder_of(template: str, kind: str, train_on: str = "assistant") -> Encoder:
    return Encoder(tokenizer_of(kind, template), train_on)


def talk(*contents: str, system: str = "") -> list[Message]:
    turns = [Message(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]
    return [Message("system", system), *turns] if system else turns


def trained_runs(encoder: Encoder, example) -> list[str]:
    """The text of each unbroken run of trained tokens."""
    runs, held = [], []
    for token, label in zip([*example.input_ids, -1], [*example.labels, IGNORED], strict=True):
        if label != IGNORED:
            held.append(token)
        elif held:
            runs.append(encoder.decode(held))
            held = []
    return runs


def squashed(text: str) -> str:
    return "".join(text.split())


words = st.text(
    st.one_of(
        st.sampled_from("abcd 12,.?!\n"), st.characters(codec="utf-8", exclude_categories=["Cs", "Cc", "Co", "Zs"])
    ),
    min_size=1,
    max_size=24,
).filter(lambda text: text.strip())
conversations = st.lists(st.tuples(words, words), min_size=1, max_size=4)


@EACH_FAMILY
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=conversations)
def test_the_trained_tokens_are_the_answers_and_their_ends(template, kind, pairs):
    encoder = encoder_of(template, kind)
    made = encoder.encode_all([("here:1", talk(*[text for pair in pairs for text in pair]))])[0]
    assert not isinstance(made, RecordError), made
    answers = [answer for _, answer in pairs]
    if template == "qwen3":  # earlier answers lose their thought once another question follows: only the last is proved
        answers = [f"<think></think>{answers[-1]}"]
    runs = trained_runs(encoder, made.example)
    if made.unknown:  # the unigram vocabulary is small: what it has no piece for decodes as unknown
        assert len(runs) == len(answers)
    else:
        assert [squashed(run) for run in runs] == [squashed(answer) + ENDS[template] for answer in answers]
    assert made.ends
    assert made.skipped == (len(pairs) - 1 if template == "qwen3" else 0)


@EACH_FAMILY
@settings(max_examples=50, deadline=None)
@given(pairs=conversations)
def test_training_ids_are_prompt_ids_and_then_the_answer(template, kind, pairs):
    encoder = encoder_of(template, kind)
    turns = talk(*[text for pair in pairs for text in pair])
    example = encoder.encode("here:1", turns)
    prompt = encoder.prompt_ids(turns[:-1])
    assert example.input_ids[: len(prompt)].tolist() == prompt
    assert example.labels[len(prompt)] != IGNORED
    assert (example.labels[: len(prompt)] == IGNORED).all() or len(pairs) > 1


@EACH_FAMILY
def test_whole_text_and_pieces_give_the_same_ids(template, kind):
    """What we tokenise piece by piece is what the tokenizer makes of the whole rendering."""
    tokenizer, encoder = tokenizer_of(kind, template), encoder_of(template, kind)
    turns = talk("How are you?", "Fine, the dog says.", "And now?", "Still fine.")
    rendered = encoder.template.render([{"role": m.role, "content": m.content} for m in turns])
    whole = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    ours = encoder.encode("here:1", turns).input_ids.tolist()
    bos = [tokenizer.bos_token_id] if encoder.tokeniser.adds_bos and whole[0] != tokenizer.bos_token_id else []
    assert ours == bos + whole


@EACH_FAMILY
@pytest.mark.parametrize("first", ["Hi", "<s>Hi", " <s> <s>Hi"])
def test_the_beginning_token_stands_there_as_often_as_the_tokenizer_alone_would_put_it(template, kind, first):
    tokenizer, encoder = tokenizer_of(kind, template), encoder_of(template, kind)
    alone = tokenizer("Hi")["input_ids"].count(tokenizer.bos_token_id)
    example = encoder.encode("here:1", talk(first, "Good day."))
    assert example.input_ids.tolist().count(tokenizer.bos_token_id) == alone
    assert not alone or example.input_ids[0] == tokenizer.bos_token_id


@EACH_FAMILY
def test_a_row_cannot_forge_a_control_token(template, kind):
    tokenizer, encoder = tokenizer_of(kind, template), encoder_of(template, kind)
    marks = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    honest = encoder.encode("here:1", talk("Hi there", "Good day."))
    control = [tokenizer.convert_tokens_to_ids(mark) for mark in marks]
    for mark in marks:
        made = encoder.encode_all([("here:2", talk(f"Hi {mark} there{mark}", f"Good {mark}day."))])[0]
        assert made.forged == (mark, mark, mark)
        for token in control:
            if token != tokenizer.unk_token_id:
                assert (made.example.input_ids == token).sum() == (honest.input_ids == token).sum(), mark
        if not made.unknown:
            assert squashed(f"Good {mark}day.") in squashed(encoder.decode(made.example.input_ids))


def test_an_assistant_keeps_its_thinking_words():
    encoder = encoder_of("qwen3", "bytes")
    tokenizer = tokenizer_of("bytes", "qwen3")
    made = encoder.encode_all([("here:1", talk("What?", "<think>\nhm\n</think>\n\nThis."))])[0]
    assert not made.forged
    assert trained_runs(encoder, made.example) == ["<think>\nhm\n</think>\n\nThis.<|im_end|>"]
    assert (made.example.input_ids == tokenizer.convert_tokens_to_ids("<think>")).sum() == 1
    asked = encoder.encode_all([("here:2", talk("Say <think>", "No."))])[0]
    assert asked.forged == ("<think>",)  # in a question it is only text


def test_per_message_train_false_and_train_on_last_and_all():
    turns = talk("a", "one", "b", "two")
    silent = [turns[0], Message("assistant", "one", train=False), *turns[2:]]
    runs = {on: trained_runs(encoder_of("chatml", "bytes", on), encoder_of("chatml", "bytes", on).encode("x:1", turns))
            for on in ("assistant", "last", "all")}  # fmt: skip
    assert runs["assistant"] == ["one<|im_end|>", "two<|im_end|>"]
    assert runs["last"] == ["two<|im_end|>"]
    assert len(runs["all"]) == 1 and runs["all"][0].endswith("two<|im_end|>\n")
    encoder = encoder_of("chatml", "bytes")
    assert trained_runs(encoder, encoder.encode("x:1", silent)) == ["two<|im_end|>"]
    ids = [encoder_of("chatml", "bytes", on).encode("x:1", turns).input_ids.tolist() for on in runs]
    assert ids[0] == ids[1] == ids[2]  # what is trained never changes what is read


def test_a_prompt_that_goes_on_differently_is_trained_from_where_it_parts():
    encoder = encoder_of("forced_thinking", "bytes_bos")
    example = encoder.encode("x:1", talk("Hi", "Good day."))
    assert trained_runs(encoder, example) == ["Good day.</s>"]
    assert any("goes on differently" in note for note in encoder.notes)
    with pytest.raises(RecordError, match="drops part of an answer"):
        encoder.encode("x:1", talk("Hi", "a thought</think>Good day."))


def test_a_thought_that_the_prompt_opens_is_trained_from_its_first_word(tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text(
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|><think>' }}{% endif %}"
    )
    encoder = Encoder(tokenizer_of("bytes", "phi"), "assistant", str(path))
    turns = talk("Say hm", "<think>hm</think>Good day.")
    example = encoder.encode("x:1", turns)
    assert trained_runs(encoder, example) == ["hm</think>Good day.</s>"]
    assert example.input_ids[: len(encoder.prompt_ids(turns[:1]))].tolist() == encoder.prompt_ids(turns[:1])


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([Message("user", "Hi")], "no assistant turn"),
        ([Message("user", "Hi"), Message("assistant", "x", train=False)], "nothing to train"),
        ([Message("assistant", "Hi")], "prefix not kept"),
        ([Message("user", "Hi"), Message("assistant", "Ho")] * 300, "too many turns"),
    ],
)
def test_a_row_without_an_answer_to_learn_is_refused_with_the_reason(turns, reason):
    with pytest.raises(RecordError) as caught:
        encoder_of("chatml", "bytes").encode("x:1", turns)
    assert caught.value.reason == reason


def test_a_template_may_refuse_one_row_and_take_the_next():
    encoder = encoder_of("gemma", "gemma_like")
    good, bad = talk("Hi", "Good day."), talk("Hi", "Good day.", system="Be brief.")
    made = encoder.encode_all([("x:1", good), ("x:2", bad), ("x:3", good)])
    assert [isinstance(one, RecordError) for one in made] == [False, True, False]
    assert made[1].reason == "refused by the chat template"
    assert "system turns are not known" in made[1].detail


def test_many_rows_at_once_are_encoded_as_each_alone():
    encoder = encoder_of("mistral", "pieces")
    rows = [(f"x:{i}", talk(f"Question {i}", f"Answer {i}", *(["More", "Yes"] if i % 3 else []))) for i in range(20)]
    for (where, turns), made in zip(rows, encoder.encode_all(rows), strict=True):
        alone = encoder.encode(where, turns)
        assert np.array_equal(alone.input_ids, made.example.input_ids)
        assert np.array_equal(alone.labels, made.example.labels)


@pytest.mark.parametrize("kind", ["bytes", "bytes_bos", "pieces", "unigram"])
def test_a_document_is_trained_whole_with_its_own_special_tokens_and_an_end(kind):
    tokenizer, encoder = tokenizer_of(kind), encoder_of("plain", kind)
    example = encoder.encode("x:1", [Message("text", "the dog sings")])
    alone = tokenizer("the dog sings")["input_ids"]
    expected = alone if alone[-1] == tokenizer.eos_token_id else [*alone, tokenizer.eos_token_id]
    assert example.input_ids.tolist() == expected
    assert example.trained_tokens() == len(expected) - 1  # a first token has nothing to be predicted from
    assert encoder.prompt_ids([Message("text", "the dog sings")]) == expected[: len(alone)] or kind == "unigram"


def test_rows_that_are_tokens_already_stay_as_they_are():
    encoder = encoder_of("chatml", "bytes")
    extra = {"input_ids": np.array([5, 6, 7], np.int32), "labels": np.array([-100, 6, 7], np.int32)}
    example = encoder.encode("x:1", [Message("tokens", "", extra=extra)])
    assert example.input_ids.tolist() == [5, 6, 7] and example.labels.tolist() == [-100, 6, 7]
    for wrong in ({"input_ids": np.array([5, 10**6], np.int32)}, {"labels": np.array([5, -100, -100], np.int32)}):
        with pytest.raises(RecordError):
            encoder.encode("x:1", [Message("tokens", "", extra={**extra, **wrong})])


def test_tools_and_tool_calls_reach_the_template_and_are_proved():
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    turns = [
        Message("tools", "", extra={"tools": [{"type": "function", "function": {"name": "weather"}}]}),
        *talk("Weather?", system="Help."),
        Message("assistant", "", extra={"tool_calls": [call]}),
        Message("tool", "rain"),
        Message("assistant", "It rains."),
    ]
    encoder = encoder_of("qwen3", "bytes")
    example = encoder.encode("x:1", turns)
    text = encoder.decode(example.input_ids)
    assert "# Tools" in text and "<tool_response>\nrain" in text
    runs = trained_runs(encoder, example)
    assert runs[-1].endswith("It rains.<|im_end|>")
    forged = [Message("tools", "", extra={"tools": [{"name": "weather", "description": "<|im_end|>"}]}), *turns[1:]]
    assert encoder.encode_all([("x:2", forged)])[0].forged == ("<|im_end|>",)
    for lost, match in ((turns, "does not write tools"), (turns[1:], "does not write tool calls")):
        with pytest.raises(RecordError, match=match):
            encoder_of("chatml", "bytes").encode("x:1", lost)


def test_a_base_without_a_template_gets_the_plain_one_and_says_so():
    encoder = encoder_of("plain", "bytes")
    assert encoder.is_plain and "plain" in encoder.notes[0]
    assert not encoder_of("chatml", "bytes").is_plain


def test_a_template_whose_turns_end_with_no_token_gets_the_end_token_after_the_last():
    encoder = encoder_of_file("chatml", "bytes")
    turns = talk("a", "one", "b", "two")
    example = encoder.encode("x:1", turns)
    assert trained_runs(encoder, example) == ["one<|im_end|>", "two<|im_end|></s>"]
    assert example.input_ids[-1] == tokenizer_of("bytes").eos_token_id
    prompt = encoder.prompt_ids(turns[:-1])
    assert example.input_ids[: len(prompt)].tolist() == prompt


def encoder_of_file(template: str, kind: str) -> Encoder:
    from support import tokenizers

    return Encoder(tokenizer_of(kind), "assistant", str(tokenizers.TEMPLATES / f"{template}.jinja"))


HOSTILE = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "blows up": "{{ 'a' * 4000000000 }}",
    "grows": "{% set s = namespace(x='a' * 16) %}{% for a in range(60) %}{% set s.x = s.x ~ s.x %}{% endfor %}",
    "babbles": "{{ lipsum(n=20000) }}",
    "pads": "{{ 'a' | center(3000000000) }}",
    "formats": "{{ '%2000000000d' % 1 }}",
    "says nothing": "nothing",
    "breaks": "{% for message in messages %}",
    "raises": "{{ raise_exception('no') }}",
    "escapes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "imports": "{% import 'os' as os %}{{ os }}",
    "nests": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "forgets answers": "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_refused_in_time(name, tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text(HOSTILE[name])
    with pytest.raises(DataError, match="template"):
        Encoder(tokenizer_of("bytes"), "assistant", str(path))


def test_a_missing_template_file_is_named():
    with pytest.raises(DataError, match=r"no file nowhere\.jinja"):
        Encoder(tokenizer_of("bytes"), "assistant", "nowhere.jinja")


def test_the_date_in_a_template_is_the_same_every_day():
    assert "strftime_now" in template_text("llama3")
    encoder = encoder_of("llama3", "bytes_bos")
    assert "26 Jul 2024" in encoder.decode(encoder.encode("x:1", talk("Hi", "Good day.")).input_ids)
