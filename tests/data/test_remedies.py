"""Every reason to drop a record has a remedy, in the table or in its detail; messages end with it."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.paths import ROOT
from support.tokenizers import make_tokenizer

from qlora.data import Data
from qlora.data.conversations.encoder import Encoder
from qlora.data.prepare import prepare
from qlora.data.remedies import REMEDIES

IN_DETAIL = {  # the detail says what to do, with names from the record
    "contradictory loss keys",
    "loss mask not applied",
    "loss mask of a part",
    "loss weight",
    "no prompt",
    "the template drops part of an answer",
    "two system texts",
}


def reasons() -> Iterator[str]:
    """Every text in the first argument of a RecordError, or the second of a BadRecord, in qlora/data."""
    for path in (ROOT / "qlora" / "data").rglob("*.py"):
        tree = ast.parse(path.read_text())
        constants = {  # names of this file that stand for a text
            target.id: node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args):
            position = {"RecordError": 0, "BadRecord": 1, "drop": 1}.get(ast.unparse(call.func).split(".")[-1])
            if position is not None and len(call.args) > position:
                for node in ast.walk(call.args[position]):
                    text = node.value if isinstance(node, ast.Constant) else None
                    text = constants.get(node.id) if isinstance(node, ast.Name) else text
                    if isinstance(text, str) and text:
                        yield text


def test_every_reason_has_a_remedy() -> None:
    known = set(reasons())
    assert len(known) > 40
    assert known - REMEDIES.keys() - IN_DETAIL == set()
    assert (REMEDIES.keys() | IN_DETAIL) - known == set(), "no record is dropped for this reason any more"
    assert [text for text in REMEDIES.values() if text.endswith(".")] == []


@pytest.mark.parametrize("overlong", ["drop", "error"])
def test_if_no_record_is_left_the_reason_and_the_remedy_are_reported(overlong: str, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"{i} word", "completion": "word " * 99}) for i in range(3)))
    section = {"train": str(path), "max_length": 32, "overlong": overlong}
    report = prepare(Data.model_validate(section), Encoder(make_tokenizer("bytes", "chatml")), 0).report
    dropped = report.warnings if overlong == "drop" else report.problems
    message = next(finding.message for finding in dropped if finding.message.startswith("dropped"))
    assert message.startswith("dropped, overlong: ") and message.endswith(
        "Raise data.max_length, or shorten the record"
    )
    last = report.problems[-1].message
    assert "no records left of 3: overlong 3" in last
    assert (message in last) if overlong == "drop" else last.endswith("See the problems above.")
