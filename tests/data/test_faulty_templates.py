"""Chat templates with a fault: each is refused, or what is trained of it is still what inference sees.

A fault in how the past is written is harmless where each answer is trained after the prompt of its own; one in how the
answer itself is written must be refused, for the record or the template as a whole.
"""

import numpy as np
import pytest
from support.tokenizers import make_tokenizer

from qlora.data.conversations.build_example import Encoded
from qlora.data.conversations.encode_records import encode_chunk
from qlora.data.conversations.encoder import Encoder
from qlora.data.prefix_tree import paths_of
from qlora.data.types import IGNORED, Record, RecordError
from qlora.errors import DataError

START, END = "<|im_start|>", "<|im_end|>"
HEAD = "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
THINK = "{%- if m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}"
TAIL = "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
PROMPT = "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
RIGHT = HEAD + THINK + TAIL + PROMPT

REFUSED = {  # a fault -> the template, and what the error says
    "writes an answer twice": (RIGHT.replace("{{ m.content +", "{{ m.content + m.content +"), "an answer twice"),
    "writes a thought twice": (RIGHT.replace("+ m.reasoning_content", "+ m.reasoning_content * 2"), "think block"),
    "writes an empty block, too": (RIGHT.replace("{{ m.content", "{{ ('<think></think>' if m.reasoning_content else '')"
                                                 " + m.content"), "think block"),
    "doubles the opening tag": (RIGHT.replace("'<think>\n' +", "'<think>\n<think>\n' +"), "think block"),
    "leaves the answers out": (RIGHT.replace("{{ m.content", "{{ (m.content if m.role == 'user' else '')"),
                               "assistant"),
    "sorts the words": (RIGHT.replace("m.content +", "(m.content.split() | sort(reverse=true) | join(' ')) +"),
                        "assistant's messages"),
    "depends on chance": (RIGHT.replace("{{ m.content", "{{ (['a', 'b', 'c', 'd'] | random) + m.content"), "chance"),
    "writes the time": ("{% set form = '%H%M%S%f' %}{{ strftime_now(form) }}" + RIGHT, "time"),
    "raises for an answer": (RIGHT.replace("{{ m.content", "{{ raise_exception('no') if m.role == 'assistant' }}"
                                           "{{ m.content"), "can't render"),
    "never ends": (HEAD + "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}" + TAIL,
                   "stop"),
}  # fmt: skip
REFUSED_RECORDS = {  # a fault of some answers -> the template, and the reason
    "cuts long answers": (RIGHT.replace("{{ m.content", "{{ m.content[:22]"), "drops part"),
    "cuts the end of an answer": (RIGHT.replace("m.content +", "(m.content | replace(' of Mars.', '')) +"),
                                  "drops part"),
    "changes an answer": (RIGHT.replace("m.content +", "(m.content | replace('Mars', 'Rams')) +"), "drops part"),
    "raises for long conversations": (RIGHT + "{% if messages | length > 3 %}{{ raise_exception('no') }}{% endif %}",
                                      "refused by the chat template"),
}  # fmt: skip
HARMLESS = {  # a fault in the past, or in the prompt's place: the law holds, answer by answer
    "right": RIGHT,
    "strips thoughts of the past": RIGHT.replace("{%- if m.reasoning", "{%- if loop.last and m.reasoning"),
    "writes empty blocks into the past": RIGHT.replace(
        "{{ m.content", "{{ ('<think></think>' if m.role == 'assistant' and not loop.last else '') + m.content"),
    "closes the last answer with another token": RIGHT.replace(
        "'<|im_end|>\n' }}", "('</s>' if loop.last and m.role == 'assistant' else '<|im_end|>\n') }}"),
    "closes the past with nothing": RIGHT.replace(
        "'<|im_end|>\n' }}", "('<|im_end|>\n' if loop.last or m.role == 'user' else '') }}"),
    "writes today's date": "{{ strftime_now('%d %b %Y') }}" + RIGHT,
}  # fmt: skip
COUNTED = {  # a prompt that is not the beginning of the rendering with the answer: such answers are left out, counted
    "drops the first turn": RIGHT.replace("in messages", "in (messages[2:] if messages | length > 3 else messages)"),
    "keeps two turns only": RIGHT.replace("in messages", "in messages[-2:]"),
    "writes thoughts of the past only without a prompt": RIGHT.replace(
        "{%- if m.reasoning", "{%- if not add_generation_prompt and m.reasoning"),
    "numbers the turns": RIGHT.replace("{{ m.content", "{{ (messages | length) ~ ' turns: ' if loop.first }}"
                                       "{{ m.content"),
    "shortens the past": RIGHT.replace("m.content +", "(m.content if loop.last else m.content[:9]) +"),
    "reverses the past": RIGHT.replace("in messages", "in (messages[:-1] | reverse | list) + messages[-1:]"),
    "changes the case of the past": RIGHT.replace("m.content +", "(m.content if loop.last else m.content | upper) +"),
}  # fmt: skip
TURNS = [{"role": "user", "content": "How many moons has Mars?"},
         {"role": "assistant", "content": "Two small moons of Mars.", "thinking": "Phobos, Deimos."},
         {"role": "user", "content": "And the Earth?"},
         {"role": "assistant", "content": "One moon, seen from Mars.", "thinking": "Only the Moon."}]  # fmt: skip


def encoder_of(text: str, tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    path = tmp_path_factory.mktemp("templates") / "template.jinja"
    path.write_text(text, encoding="utf-8")
    return Encoder(make_tokenizer("bytes", "qwen3"), "assistant", str(path))


def result_of(encoder: Encoder) -> Encoded | RecordError | None:
    return encode_chunk([Record("x:1", {"messages": TURNS})], "auto", encoder)[0]


@pytest.mark.parametrize("fault", REFUSED)
def test_a_template_with_a_fault_is_refused(fault: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    text, message = REFUSED[fault]
    with pytest.raises(DataError, match=message):
        encoder_of(text, tmp_path_factory)


@pytest.mark.parametrize("fault", REFUSED_RECORDS)
def test_a_record_that_the_template_spoils_is_refused(fault: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    text, reason = REFUSED_RECORDS[fault]
    assert reason in str(result_of(encoder_of(text, tmp_path_factory)))


@pytest.mark.parametrize("fault", HARMLESS | COUNTED)
def test_each_answer_follows_its_own_prompt(fault: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Its context is the prompt, its text all that the record says, and both answers are trained or counted."""
    encoder = encoder_of((HARMLESS | COUNTED)[fault], tmp_path_factory)
    result = result_of(encoder)
    if fault in COUNTED and isinstance(result, RecordError):
        assert result.reason == "prefix not kept"
        return
    assert isinstance(result, Encoded), result
    answers = {}
    for path in paths_of(result.example):
        trained = np.flatnonzero(np.diff((path.labels != IGNORED).astype(int), prepend=0, append=0)).reshape(-1, 2)
        answers |= {
            encoder.decode(path.input_ids[a:b]): encoder.decode(path.input_ids[:a]) for a, b in trained.tolist()
        }
    turns = [
        {"reasoning_content" if key == "thinking" else key: value for key, value in turn.items()} for turn in TURNS
    ]
    counts = result.answers
    assert len(answers) == counts.trained == counts.trained_thoughts and counts.total == 2
    assert (result.untrained_answers > 0) == (fault in COUNTED)
    for index in (1, 3)[: counts.trained]:
        prompt = encoder.template.render(turns[:index], prompt=True)
        (answer,) = [text for text, context in answers.items() if context == prompt]
        thought, content = TURNS[index]["thinking"], TURNS[index]["content"]
        assert answer.removesuffix("</s>").removesuffix(END) == f"<think>\n{thought}\n</think>\n\n{content}"


def test_at_least_twenty_faults_are_planted() -> None:
    assert len(REFUSED) + len(REFUSED_RECORDS) + len(HARMLESS) - 1 + len(COUNTED) >= 20
