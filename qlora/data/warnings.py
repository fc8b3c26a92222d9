"""Warnings about the data set as a whole. They do not stop a run."""

import numpy as np
import numpy.typing as npt

from qlora.data.batching.filter import ExampleFilter
from qlora.data.types import Finding, count_of

FEW_RECORDS = 100  # with fewer, a LoRA memorizes the records within an epoch or two
LOW_TRAINED = 0.02  # fraction of the tokens
MANY_OVERLONG = 0.05  # fraction of the records above data.max_length
SAME_ANSWER = 0.5  # fraction of the records


def data_set_warnings(examples: ExampleFilter, lengths: npt.NDArray[np.int64]) -> list[Finding]:
    """Warnings about the kept examples. lengths: tokens of each."""
    texts = [
        *examples.unused.warnings(),
        *_answers(examples),
        *_control_strings(examples),
        *_amount(examples),
        *_overlong(examples, lengths),
        *_same_answer(examples),
    ]
    return [Finding(examples.where, text) for text in texts]


def _answers(examples: ExampleFilter) -> list[str]:
    texts = []
    if examples.without_end_token.count:
        text = (
            "without a trained end token: the model may not stop. Raise data.max_length for truncated ones; for others "
        )
        text += "name a template in model.chat_template that ends an answer with a token"
        texts.append(examples.without_end_token.describe(text))
    if examples.with_untrained_answers.count:
        text = f"with answers ({examples.untrained_answers} in all) that are not trained: their prompt is not the "
        text += "beginning of their rendering, or they have none. Name another template in model.chat_template"
        texts.append(examples.with_untrained_answers.describe(text))
    return texts


def _control_strings(examples: ExampleFilter) -> list[str]:
    if 2 * examples.control_records <= examples.kept:
        return []
    text = (
        "records have control strings in their text. If they are rendered conversations, give them as messages; or as "
        "plain text with data.control_strings: accept, if you trust the files"
    )
    return [f"{examples.control_records} {text}"]


def _amount(examples: ExampleFilter) -> list[str]:
    texts = []
    if 0 < sum(examples.pieces) < FEW_RECORDS:
        texts.append(f"{count_of(examples.kept)}: will overfit; use {FEW_RECORDS} or more, or fewer epochs")
    fraction = examples.trained_tokens / examples.tokens if examples.tokens else 1.0
    if 0 < fraction < LOW_TRAINED:
        texts.append(f"only {fraction:.1%} of the tokens are trained: long prompts, short answers. Check data.train_on")
    return texts


def _overlong(examples: ExampleFilter, lengths: npt.NDArray[np.int64]) -> list[str]:
    """The max_length at which 99 % of the examples fit."""
    count = len(lengths) - examples.truncated + len(examples.overlong_lengths)
    if len(examples.overlong_lengths) <= MANY_OVERLONG * count:
        return []
    fitting = np.sort(lengths)[: len(lengths) - examples.truncated]
    all_lengths = np.concatenate([fitting, np.asarray(examples.overlong_lengths)])
    enough = int(np.quantile(all_lengths, 0.99, method="higher"))
    fraction = len(examples.overlong_lengths) / count
    return [f"{fraction:.0%} of the records are above data.max_length; {enough} would hold 99 % of them"]


def _same_answer(examples: ExampleFilter) -> list[str]:
    """A model soon gives no other answer than the one that most records share."""
    if examples.kept < FEW_RECORDS:
        return []
    _, counts = np.unique(np.asarray(examples.answer_keys, dtype=np.uint64), return_counts=True)
    fraction = counts.max() / examples.kept
    text = "of the records have the same answer: the model may learn to give no other. Add other records, or drop some"
    return [f"{fraction:.0%} {text}"] if fraction > SAME_ANSWER else []
