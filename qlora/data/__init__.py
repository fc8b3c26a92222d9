"""Rows -> messages -> tokens -> batches.

A format turns a row into messages and has no other effect; which tokens are trained is decided in one place (tokens.py)
and proved by rendering prefixes; the order of rows is a pure function of (seed, epoch, step).
"""

from collections.abc import Mapping
from typing import Annotated, Literal

from qlora.config import REQUIRED, KindOf, OneOrMany, Section, setting
from qlora.utils.registry import Registry

FORMATS = Registry(
    "data.format",
    alpaca="qlora.data.formats.alpaca:Alpaca",  # instruction, input, output (+ system, history)
    sharegpt="qlora.data.formats.sharegpt:Sharegpt",  # conversations: [{from, value}]
    messages="qlora.data.formats.messages:Messages",  # messages: [{role, content}]
    completion="qlora.data.formats.completion:Completion",  # prompt, completion
    text="qlora.data.formats.text:Text",  # text
    tokens="qlora.data.formats.tokens:Tokens",  # input_ids, labels
)


class Source(Section):
    """One data set among several."""

    path: str = setting(REQUIRED, "file, folder, glob or hub name", min_length=1, examples=["data/train.jsonl"])
    format: Annotated[str, KindOf(FORMATS, "auto")] | None = setting(
        None, "as data.format, for this one; null: that one"
    )
    split: str | None = setting(None, "split of a folder or hub data set; null: train on the hub, all of a folder")
    columns: dict[str, str] | None = setting(None, "our column name: theirs, as in {prompt: question}")
    weight: float = setting(1.0, "how often each row is seen in an epoch, on average", gt=0)
    max_samples: int | None = setting(None, "only the first so many rows", ge=1)


class Data(Section):
    """What is learnt from."""

    train: Annotated[tuple[Source, ...], OneOrMany("path")] = setting(
        REQUIRED,
        "file, folder, glob, hub name, or a list of {path, ...}",
        min_length=1,
        examples=["data/train.jsonl"],
    )
    eval: Annotated[tuple[Source, ...], OneOrMany("path")] | None = setting(
        None, "held-out rows, written as in train; null: eval_fraction takes some of train's"
    )
    eval_fraction: float = setting(0.02, "share of the rows held out; 0: no evaluation", ge=0, lt=1, unsaid=True)
    format: Annotated[str, KindOf(FORMATS, "auto")] = setting(
        "auto", "auto (by columns) | alpaca | sharegpt | messages | completion | text | tokens"
    )
    max_length: int = setting(2048, "tokens of a row, at most", ge=1)
    overlong: Literal["drop", "truncate", "error"] = setting("drop", "rows longer than that; counted in every case")
    packing: bool = setting(True, "put short rows together into full ones")
    order: Literal["shuffle", "length", "sequential"] = setting(
        "shuffle", "of an epoch: shuffle | length (like lengths in a step) | sequential; packing off for the last two"
    )
    train_on: Literal["assistant", "last", "all"] = setting(
        "assistant", "whose words are learnt: assistant | last | all"
    )

    def idle(self) -> Mapping[str, str]:
        """Rows are held out of the training set only where there is no evaluation set."""
        return {"eval_fraction": "data.eval names the held-out rows"} if self.eval is not None else {}

    def clashes(self) -> Mapping[str, str]:
        """A packed row holds rows from everywhere in the files, and all packed rows are about as long."""
        if self.order == "shuffle" or not self.packing:
            return super().clashes()
        why = f"{self.order} has no effect while rows are packed. Set data.packing: false, or leave data.order out."
        return {**super().clashes(), "order": why}
