"""Training data: record -> messages -> conversation -> loss mask -> tokens -> example -> sequence -> micro-batch.

A format reads the messages of a record and has no other effect. Which tokens are trained is decided in one place
(conversations/loss_mask.py) and verified. The order of the sequences is a pure function of (seed, epoch, step).
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from qlora.config import REQUIRED, KindOf, OneOrMany, Section, Validator, setting
from qlora.utils.registry import Registry

FORMATS = Registry(
    "data.format",
    alpaca="qlora.data.formats.alpaca:Alpaca",  # instruction, input, output (+ system, history)
    sharegpt="qlora.data.formats.sharegpt:Sharegpt",  # conversations: [{from, value}]
    messages="qlora.data.formats.messages:Messages",  # messages: [{role, content}] (+ tools, system)
    completion="qlora.data.formats.completion:Completion",  # prompt, completion
    text="qlora.data.formats.text:Text",  # text
    tokens="qlora.data.formats.tokens:Tokens",  # input_ids, labels
    preference="qlora.data.formats.preference:Preference",  # chosen, rejected (+ prompt)
    feedback="qlora.data.formats.feedback:Feedback",  # prompt, completion, label
)
SIDED_FORMATS = ("preference", "feedback")  # for the objectives that compare answers


RESERVED = ("messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize")


def refuse_reserved(values: dict[str, Any]) -> dict[str, Any]:
    """ValueError for an argument of the chat template that qlora sets itself."""
    taken = sorted(values.keys() & {*RESERVED})
    if taken:
        raise ValueError(f"{taken[0]!r} is set by qlora, from the record. Remove it.")
    return values


class Source(Section):
    """One data set of data.train or data.eval."""

    path: str = setting(REQUIRED, "file, folder, glob or hub name", min_length=1, examples=["data/train.jsonl"])
    format: Annotated[str, KindOf(FORMATS, "auto")] | None = setting(None, "format of this data set; null: data.format")
    split: str | None = setting(
        None, "split of a folder or hub data set; null: all of a folder, train of a hub data set"
    )
    columns: dict[str, str] | None = setting(
        None, "renamed columns, {new name: name in the file}, as in {prompt: question}"
    )
    weight: float = setting(1.0, "copies of each record in an epoch, on average", gt=0)
    max_samples: int | None = setting(None, "use only the first N records", ge=1)


class Data(Section):
    """Training and evaluation data."""

    train: Annotated[tuple[Source, ...], OneOrMany("path")] = setting(
        REQUIRED,
        "file, folder, glob, hub name, or a list of {path, ...}",
        min_length=1,
        examples=["data/train.jsonl"],
    )
    eval: Annotated[tuple[Source, ...], OneOrMany("path")] | None = setting(
        None, "evaluation data, in the form of train; null: eval_fraction of the training data"
    )
    eval_fraction: float = setting(
        0.02, "fraction of the examples held out; 0: no evaluation", ge=0, lt=1, nullable=True
    )
    format: Annotated[str, KindOf(FORMATS, "auto")] = setting(
        "auto", "auto (by columns) | alpaca | sharegpt | messages | completion | text | tokens | preference | feedback"
    )
    max_length: int = setting(2048, "maximum tokens of a sequence", ge=1)
    overlong: Literal["auto", "split", "drop", "truncate", "error"] = setting(
        "auto",
        "examples above max_length: auto (split for plain text, else drop) | split | drop | truncate | error; counted",
    )
    packing: bool = setting(True, "pack short examples into sequences of up to max_length")
    order: Literal["shuffle", "length", "sequential"] = setting(
        "shuffle", "of an epoch: shuffle | length (similar ones in a step) | sequential; last two: packing off"
    )
    train_on: Literal["assistant", "last", "all"] = setting(
        "assistant", "tokens that bear loss: every answer (assistant) | last answer | all"
    )
    control_strings: Literal["text", "accept"] = setting(
        "text", "in plain text: text (as letters) | accept (as control tokens; only for files you trust)"
    )

    template_args: Annotated[dict[str, bool | int | float | str], Validator(refuse_reserved)] = setting(
        {}, "arguments of the chat template, as in {enable_thinking: false}"
    )
    thinking: Literal["as_template", "in_content", "drop"] = setting(
        "as_template",
        "thoughts: as_template (where it writes them) | in_content (<think>...</think> where it has no place) | drop",
    )
    empty_thinking: Literal["mask", "train"] = setting(
        "mask", "an empty think block that the template writes before an answer: mask (bears no loss) | train"
    )

    def without_effect(self) -> Mapping[str, str]:
        """Examples are held out of the training data only where there is no evaluation data."""
        return {"eval_fraction": "data.eval names the evaluation data"} if self.eval is not None else {}

    def conflicts(self) -> Mapping[str, str]:
        """Settings without effect. All packed sequences have similar lengths; only text is split or may be accepted."""
        conflicts = dict(super().conflicts())
        if self.order != "shuffle" and self.packing:
            why = "has no effect on packed sequences. Set data.packing: false, or remove data.order."
            conflicts["order"] = f"{self.order} {why}"
        formats = {source.format or self.format for source in (*self.train, *(self.eval or ()))}
        if self.overlong == "split" and not formats & {"auto", "text", "tokens"}:
            conflicts["overlong"] = "split has no effect: no data set has the format text or tokens. Remove it."
        if self.template_args and not formats - {"text", "tokens"}:
            conflicts["template_args"] = "has no effect: no data set is rendered with a chat template. Remove it."
        if self.control_strings == "accept" and not formats & {"auto", "text"}:
            conflicts["control_strings"] = "accept has no effect: no data set has the format text. Remove it."
        return conflicts
