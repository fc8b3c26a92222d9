"""Preference pairs and feedback: columns of public data sets, one reason for each record that can't be compared."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_models import byte_tokenizer

from qlora.data import Data
from qlora.data.batching.packing import split_documents
from qlora.data.compared import ComparedExample
from qlora.data.conversations.encoder import Encoder
from qlora.data.mismatched import MismatchedAnswers
from qlora.data.pairs import apart, chosen_answers, pair_of, sides_of
from qlora.data.prepare import Prepared, prepare
from qlora.data.preview import answers_of
from qlora.data.types import CHOSEN, IGNORED, REJECTED, Example


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(byte_tokenizer())


def turn(*texts: str) -> list[dict[str, str]]:
    roles = ("user", "assistant") * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def prepared(
    encoder: Encoder, folder: Path, rows: Sequence[Mapping[str, Any]], kind: str = "preference", **settings: Any
) -> Prepared:
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    section = Data(train=[{"path": str(path)}], **{"eval_fraction": 0.0, "packing": False, **settings})  # type: ignore[arg-type]
    shares = settings.pop("shares", True)
    return prepare(section, encoder, 0, shares_prefixes=shares, sided_format=kind)


def answers(encoder: Encoder, example: Example) -> list[str]:
    """The trained text of each side."""
    return [encoder.decode(side.labels[side.labels != IGNORED]) for side in sides_of(example)]


TRANSCRIPTS = {
    "chosen": "\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: and?\n\nAssistant: yes",
    "rejected": "\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: and?\n\nAssistant: no",
}


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "and?", "chosen": "yes", "rejected": "no"},
        {"prompt": turn("and?"), "chosen": turn("x", "yes")[1:], "rejected": turn("x", "no")[1:]},
        {"system": "Be brief.", "question": "and?", "chosen": "yes", "rejected": "no"},  # Intel/orca_dpo_pairs
        {"prompt": "and?", "chosen": turn("and?", "yes"), "rejected": turn("and?", "no"), "score_chosen": 8.0,
         "score_rejected": 3.5, "messages": turn("and?", "yes")},  # ultrafeedback_binarized
        TRANSCRIPTS,  # Anthropic/hh-rlhf
        {"conversations": [{"from": "human", "value": "and?"}], "chosen": {"from": "gpt", "value": "yes"},
         "rejected": {"from": "gpt", "value": "no"}},  # LLaMA-Factory
    ],
    ids=["texts", "messages", "orca", "ultrafeedback", "hh", "llama-factory"],
)  # fmt: skip
def test_columns_of_public_data_sets_are_read(encoder: Encoder, tmp_path: Path, fields: Mapping[str, Any]) -> None:
    data = prepared(encoder, tmp_path, [fields])
    assert data.report.kept == 1, data.report.warnings
    (example,) = data.train
    assert [text.removesuffix("<|im_end|>").strip() for text in answers(encoder, example)] == ["yes", "no"]
    assert [side.role for side in example.sides] == [CHOSEN, REJECTED]
    contexts = [encoder.decode(answer["context_ids"]) for answer in answers_of(example)]
    assert contexts[0] == contexts[1] and "and?" in contexts[0]


REASONS: list[tuple[str, dict[str, Any]]] = [
    ("identical sides", {"prompt": "a", "chosen": "b", "rejected": "b"}),
    ("identical sides", {"chosen": turn("a", "b"), "rejected": turn("a", "b")}),
    ("different prompts", {"chosen": turn("a", "b"), "rejected": turn("c", "b")}),
    ("different prompts", {"chosen": turn("a", "b", "c", "d"), "rejected": turn("a", "b", "x", "d")}),
    ("different prompts", {"chosen": turn("a", "b"), "rejected": "c"}),
    ("different prompts", {"prompt": "x", "chosen": turn("a", "b"), "rejected": turn("a", "c")}),
    ("missing field", {"prompt": "a", "chosen": "b"}),
    ("missing field", {"chosen": "b", "rejected": "c"}),
    ("empty answer", {"prompt": "a", "chosen": "b", "rejected": " "}),
    ("nothing to train", {"prompt": "a", "chosen": "b", "rejected": [{**turn("", "c")[1], "train": False}]}),
    ("overlong", {"prompt": "a", "chosen": "b", "rejected": "c " * 200}),
    ("tie", {"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 3, "score_rejected": 3.0}),
    ("sides exchanged", {"prompt": "a", "chosen": "b", "rejected": "c", "chosen_rating": 1, "rejected_rating": 4}),
]


@pytest.mark.parametrize(("reason", "fields"), REASONS, ids=[f"{i} {reason}" for i, (reason, _) in enumerate(REASONS)])
def test_a_pair_that_can_not_be_compared_is_dropped_by_name(
    encoder: Encoder, tmp_path: Path, reason: str, fields: Mapping[str, Any]
) -> None:
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    report = prepared(encoder, tmp_path, [good, fields], max_length=128).report
    assert report.dropped == {reason: 1} and report.kept == 1
    (warning,) = [finding.message for finding in report.warnings if finding.message.startswith("dropped")]
    assert warning.startswith(f"dropped, {reason}")


@pytest.mark.parametrize("label", [None, "true", 2, [True]])
def test_a_label_is_true_or_false(encoder: Encoder, tmp_path: Path, label: Any) -> None:
    good = {"prompt": "a", "completion": "b", "label": False}
    data = prepared(encoder, tmp_path, [good, {**good, "label": label}], "feedback")
    assert data.report.dropped == {"wrong label": 1} and data.train[0].sides == ((0, REJECTED),)


@pytest.mark.parametrize(
    ("reason", "fields"),
    [
        ("missing field", {"prompt": "a", "completion": "b"}),
        ("missing field", {"prompt": "a", "label": True}),
        ("empty answer", {"prompt": "a", "completion": " ", "label": True}),
        ("no assistant turn", {"messages": turn("a", "b", "c"), "label": True}),
        ("overlong", {"prompt": "a", "completion": "b " * 200, "label": True}),
    ],
)
def test_an_answer_that_can_not_be_labeled_is_dropped_by_name(
    encoder: Encoder, tmp_path: Path, reason: str, fields: Mapping[str, Any]
) -> None:
    good = {"prompt": "a", "completion": "b", "label": False}
    report = prepared(encoder, tmp_path, [good, fields], "feedback", max_length=128).report
    assert report.dropped == {reason: 1} and report.kept == 1


def test_only_the_last_answer_of_labeled_messages_is_compared(encoder: Encoder, tmp_path: Path) -> None:
    rows = [{"messages": turn("Hi", "Ho", "and?", "yes"), "label": True}]
    (example,) = prepared(encoder, tmp_path, rows, "feedback").train
    assert [text.removesuffix("<|im_end|>").strip() for text in answers(encoder, example)] == ["yes"]


def test_answers_that_begin_alike_are_trained_whole_on_both_sides(encoder: Encoder, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "chosen": "the same start yes", "rejected": "the same start no"}]
    (example,) = prepared(encoder, tmp_path, rows).train
    assert all("the same start" in text for text in answers(encoder, example))
    ((start, parent),) = example.branches
    assert example.labels[start] != IGNORED and example.labels[parent] == IGNORED


@pytest.mark.parametrize("shares", [True, False], ids=["tree", "documents"])
def test_a_stored_pair_keeps_its_sides(encoder: Encoder, tmp_path: Path, shares: bool) -> None:
    rows = [{"prompt": "a b", "chosen": f"b {i}", "rejected": "c c"} for i in range(3)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    section = Data(train=[{"path": str(path)}], eval_fraction=0.0)  # type: ignore[arg-type]
    (packed,) = prepare(section, encoder, 0, shares_prefixes=shares, sided_format="preference").train
    assert len(packed.sides) == 6 and bool(packed.branches) == shares
    assert len(packed.document_starts()) == (3 if shares else 6)
    texts = answers(encoder, packed)
    assert ["b" in text for text in texts] == [True, False] * 3
    assert [text for text in texts[::2]] == [
        encoder.decode(e.labels[e.labels != IGNORED]) for e in chosen_answers([packed])
    ]


def test_a_tree_apart_is_the_two_conversations(encoder: Encoder, tmp_path: Path) -> None:
    (example,) = prepared(encoder, tmp_path, [{"prompt": "a b", "chosen": "b", "rejected": "c c"}]).train
    separate = apart(example)
    assert not separate.branches and len(separate.document_starts()) == 2
    for one, other in zip(sides_of(example), sides_of(separate), strict=True):
        assert np.array_equal(one.input_ids, other.input_ids) and np.array_equal(one.labels, other.labels)


@pytest.mark.parametrize("packing", [False, True])
def test_a_mismatched_answer_is_that_of_the_record_before(encoder: Encoder, tmp_path: Path, packing: bool) -> None:
    rows = [{"prompt": f"ask {i}", "completion": f"tell {i}", "label": i == 0} for i in range(7)]
    data = prepared(encoder, tmp_path, rows, "feedback", packing=packing, max_length=128)
    others = {}
    for example in MismatchedAnswers(data.train, 128, 3):
        assert isinstance(example, ComparedExample) and example.mismatched is not None
        for document in split_documents(example.mismatched):
            text = encoder.decode(document.input_ids)
            others[int(text.partition("ask ")[2][0])] = int(text.partition("tell ")[2][0])
    (cut,) = {len(example.mismatched) for example in MismatchedAnswers(data.train, 9, 3)[:1]}  # type: ignore[attr-defined]
    assert cut == 9 * len(split_documents(data.train[0]))
    # Groups of three in the order of the data, the last record in the group before it.
    assert len(data.train) < 7 or not packing
    assert others == {0: 2, 1: 0, 2: 1, 3: 6, 4: 3, 5: 4, 6: 5}


def test_the_prompt_ends_before_the_first_token_that_a_side_trains() -> None:
    chosen, rejected = (
        Example("x", np.array(ids, np.int32), np.array(labels, np.int32))
        for ids, labels in (([1, 2, 3, 4], [IGNORED, IGNORED, 3, 4]), ([1, 2, 5, 6], [IGNORED, IGNORED, IGNORED, 6]))
    )
    pair = pair_of("x", chosen, rejected)
    assert pair.input_ids.tolist() == [1, 2, 3, 4, 5, 6] and pair.branches[0] == (4, 1)
