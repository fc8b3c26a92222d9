"""Every answer is trained, after exactly what an engine would send: the chat templates of released models.

The expected ids come from the tokenizer's own apply_chat_template on the turns before an answer, and with it.
"""

import re
from functools import cache
from typing import Any

import numpy as np
import pytest
from data.test_real_templates import ARGUMENTS, EACH_TEMPLATE, FOLDER, TOOL, WITHOUT_CALLS
from support.tokenizers import tokenizer_for

from qlora.data.conversations.build_example import Encoded
from qlora.data.conversations.encode_records import encode_chunk
from qlora.data.conversations.encoder import Encoder
from qlora.data.prefix_tree import paths_of
from qlora.data.types import IGNORED, Example, Record

ANSWERS = 4
DATE, CURRENT_DATE = "26 Jul 2024", 'strftime_now("%Y-%m-%d")'  # pinned in training, too
Answer = tuple[list[int], list[int]]  # ids of the context, ids that are trained
EMPTY_BLOCK = re.compile(r"\s*(<(think|thinking|thought)>\s*)?</(think|thinking|thought)>\s*")
FORMS = ("none", "reasoning_content", "thinking", "content")
THINKING = {"diffusion_gemma", "gemma4_v5", "glm4moe", "gptoss", "lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl",
            "muse_glimmer", "nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra",
            "qwen3", "qwen3_5_think", "qwen3_6", "qwen3_8"}  # fmt: skip
# A prompt opens a think block that the answer does not have so: the answer is trained from where the two differ, as
# inference sends it with thinking switched off.
OTHER_PROMPT = {
    "deepseek_r1_distill": FORMS,  # "<think>\n" ends the prompt, and is never before an answer
    "deepseekv3": FORMS,
    "nemotron_3_5_lightning": ("none",),  # the prompt ends with "<think>\n"; "<think></think>" is before an answer
    "nemotron_3_nano": ("none",),
    "nemotron_3_super": ("none",),
    "nemotron_3_ultra": ("none",),
}
EOS_LAST = {"phi3", "phi3_5"}  # the text ends with a token that is not the answer's, and that no turn follows
WITHOUT_END = {"glm4moe"}  # the next turn's token ends an answer; the tokenizer's end token is added
CALL_THOUGHTS = {"gemma4", "gemma4_v3", "gemma4_v4"}  # thoughts are written before calls only
# A thought in the content is cut off by the template, and can't be trained.
CUTS_THOUGHTS = {"deepseek_r1_distill", "deepseekv3", "qwen3_5_nothink"}


@cache
def build_encoder(name: str) -> Encoder:
    return Encoder(tokenizer_for((FOLDER / f"{name}.jinja").read_text(encoding="utf-8")))


def thought(number: int) -> str:
    return f"Count the moons {number}."


def conversation(answers: int, form: str, first: int = 0) -> list[dict[str, Any]]:
    turns = list[dict[str, Any]]()
    for number in range(first, first + answers):
        answer = {"role": "assistant", "content": f"Answer {number}."}
        if form == "content":
            answer["content"] = f"<think>\n{thought(number)}\n</think>\n\n{answer['content']}"
        elif form != "none":
            answer[form] = thought(number)
        turns += [{"role": "user", "content": f"Question {number}?"}, answer]
    return turns


def encoded_of(name: str, fields: dict[str, Any]) -> Encoded:
    (result,) = encode_chunk([Record("x:1", fields)], "auto", build_encoder(name))
    assert isinstance(result, Encoded), result
    return result


def answers_of(example: Example) -> list[Answer]:
    """Each trained run of each path, with all ids before it, shortest first."""
    answers = []
    for path in paths_of(example):
        trained = np.append(path.labels != IGNORED, False)
        edges = np.flatnonzero(np.diff(trained.astype(int), prepend=0))
        for start, end in edges.reshape(-1, 2):
            answers.append((path.input_ids[:start].tolist(), path.input_ids[start:end].tolist()))
    return sorted(answers, key=lambda answer: len(answer[0]))


def template_turns(name: str, turns: list[dict[str, Any]], form: str) -> list[dict[str, Any]]:
    """The turns in the form that the template reads."""
    if form == "none" or (form == "content" and name not in THINKING | CUTS_THOUGHTS):
        return turns
    plain = [{key: value for key, value in turn.items() if key not in FORMS[1:3]} for turn in turns]
    for number, turn in enumerate(turn for turn in plain if turn["role"] == "assistant"):
        turn["content"] = turn["content"].split("</think>\n\n")[-1]
        if name in THINKING:
            turn["reasoning_content"] = thought(number)
    return plain


def check_answer(name: str, answer: Answer, before: list[Any], turns: list[Any], tools: Any = None) -> str:
    """The text that is trained; asserts that context and answer have the ids of the template's own renderings."""
    encoder = build_encoder(name)
    tokenizer = encoder.template._tokenizer
    options = {"tools": tools, "tokenize": False, "date_string": DATE}
    options["chat_template"] = tokenizer.chat_template.replace(CURRENT_DATE, '"2024-07-26"').replace(
        CURRENT_DATE.replace('"', "'"), "'2024-07-26'"
    )
    texts = [tokenizer.apply_chat_template(part, add_generation_prompt=prompt, **options)
             for part, prompt in ((before, True), (turns, False))]  # fmt: skip
    prompt, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    context, trained = answer
    trained = trained[:-1] if name in WITHOUT_END and trained[-1] == tokenizer.eos_token_id else trained
    assert context[: len(prompt)] == prompt
    assert not context[len(prompt) :] or EMPTY_BLOCK.fullmatch(encoder.decode(context[len(prompt) :]))
    if context == prompt:
        assert whole[: len(context) + len(trained)] == context + trained
    rest = texts[1].removeprefix(encoder.decode(context + trained))
    assert rest != texts[1] and rest.strip() in ("", "</s>" if name in EOS_LAST else "")
    text = encoder.decode(trained)
    assert not EMPTY_BLOCK.match(text)
    return text


@pytest.mark.sample(of=8)
@EACH_TEMPLATE
@pytest.mark.parametrize("form", FORMS)
def test_each_answer_follows_what_inference_would_send(name: str, form: str) -> None:
    encoder = build_encoder(name)
    turns = conversation(ANSWERS, form)
    seen = template_turns(name, turns, form)
    for count in (1, 2, ANSWERS):
        encoded = encoded_of(name, {"messages": turns[: 2 * count]})
        answers = answers_of(encoded.example)
        keeps = form != "none" and (name in THINKING or (form == "content" and name not in CUTS_THOUGHTS))
        counts = encoded.answers
        assert (counts.total, counts.trained) == (count, count) == (len(answers), count)
        assert (counts.thoughts, counts.trained_thoughts) == (count * (form != "none"), count * keeps)
        for number, answer in enumerate(answers):
            if form in OTHER_PROMPT.get(name, ()) or number < count - 1 < ANSWERS - 1:  # the last one, and all of four
                text = encoder.decode(answer[1])
            else:
                text = check_answer(name, answer, seen[: 2 * number + 1], seen[: 2 * number + 2])
            assert f"Answer {number}." in text and text.count("Answer") == 1
            assert text.count(thought(number)) == keeps and text.count("Count") == keeps


@pytest.mark.sample(of=8)
@EACH_TEMPLATE
@pytest.mark.parametrize("form", FORMS[:2])
def test_calls_and_answers_after_results_are_each_trained(name: str, form: str) -> None:
    """Two rounds of a call, its result and an answer."""
    if name in WITHOUT_CALLS:
        return
    turns = list[dict[str, Any]]()
    for number in range(2):
        call = {"id": f"abcdefgh{number}", "type": "function", "function": {"name": "look", "arguments": ARGUMENTS}}
        thinks = {form: thought(number)} if form != "none" else {}
        turns += [{"role": "user", "content": f"Question {number}?"},
                  {"role": "assistant", "content": "", "tool_calls": [call], **thinks},
                  {"role": "tool", "content": f"Result {number}.", "name": "look", "tool_call_id": call["id"]},
                  {"role": "assistant", "content": f"Answer {number}."}]  # fmt: skip
    encoded = encoded_of(name, {"messages": turns, "tools": [TOOL]})
    texts = [build_encoder(name).decode(own) for _, own in answers_of(encoded.example)]
    assert encoded.answers.trained == encoded.answers.total == len(texts) == 4
    assert [number for text in texts for number in (0, 1) if f"Answer {number}." in text] == [0, 1]
    assert sum("bolt 7" in text for text in texts) == 2 and not any("Result" in text for text in texts)
    assert encoded.answers.trained_thoughts == sum("Count the moons" in text for text in texts)
    assert encoded.answers.trained_thoughts == (2 if form != "none" and name in THINKING | CALL_THOUGHTS else 0)


@pytest.mark.parametrize(
    ("name", "marked"),
    [("qwen2_5_training", ""), ("llama3_training", ""), ("gemma3_training", ""), ("cohere2_training", ""),
     ("qwen3_training", "<think>"), ("gptoss_training", "<|start|>assistant")],
)  # fmt: skip
def test_generation_marks_are_compared_with_the_mask_and_never_its_source(name: str, marked: str) -> None:
    """The marks of some cover the header or an empty block, which bear no loss."""
    notes = [note for note in build_encoder(name).notes if "generation marks" in note]
    assert len(notes) == bool(marked) and all(marked in note.split(" of a sample answer")[0] for note in notes)
    (answer,) = answers_of(encoded_of(name, {"messages": conversation(1, "none")}).example)
    assert not marked or marked not in build_encoder(name).decode(answer[1])
