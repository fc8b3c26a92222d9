"""What concerns many rows at once: nothing that stops a run, all that a user would want to know before it."""

import numpy as np
import numpy.typing as npt

from qlora.data.batching.filter import ExampleFilter
from qlora.data.types import Finding, counted

FEW_ROWS = 100  # below, a LoRA learns the rows by heart within an epoch or two
LITTLE_TRAINED = 0.02  # of the tokens
MANY_CUT = 0.05  # of the rows, above data.max_length
ONE_ANSWER = 0.5  # of the rows


def advice(gate: ExampleFilter, lengths: npt.NDArray[np.int64]) -> list[Finding]:
    """What to know about the rows that passed `gate`; `lengths` are the tokens of each."""
    told = [*_endings(gate), *_control(gate), *_amount(gate), *_cut(gate, lengths), *_sameness(gate)]
    return [Finding(gate.where, text) for text in told]


def _endings(gate: ExampleFilter) -> list[str]:
    found = []
    if gate.open_ended.count:
        found.append(gate.open_ended.told("without a trained end token: the model may not stop"))
    if gate.skipped.count:
        text = f"with answers ({gate.skipped_answers} in all) that are not trained: "
        found.append(gate.skipped.told(text + "the template rewrites them later on"))
    return found


def _control(gate: ExampleFilter) -> list[str]:
    if 2 * gate.control_rows <= gate.kept:
        return []
    text = "of the rows hold control strings; are they conversations written out already? Give them as messages"
    return [f"{gate.control_rows} {text}"]


def _amount(gate: ExampleFilter) -> list[str]:
    found = []
    if 0 < gate.kept < FEW_ROWS:
        found.append(f"{counted(gate.kept)}: will overfit; {FEW_ROWS} or more, or fewer epochs")
    share = gate.trained_tokens / gate.tokens if gate.tokens else 1.0
    if 0 < share < LITTLE_TRAINED:
        found.append(f"only {share:.1%} of the tokens are trained: long prompts, short answers. Is train_on as meant?")
    return found


def _cut(gate: ExampleFilter, lengths: npt.NDArray[np.int64]) -> list[str]:
    """How long rows would have to be for nearly all of them to be trained whole."""
    rows = len(lengths) - gate.truncated + len(gate.too_long)
    if len(gate.too_long) <= MANY_CUT * rows:
        return []
    fitting = np.sort(lengths)[: len(lengths) - gate.truncated]
    enough = int(np.quantile(np.concatenate([fitting, np.asarray(gate.too_long)]), 0.99, method="higher"))
    share = len(gate.too_long) / rows
    return [f"{share:.0%} of the rows are above data.max_length; {enough} would hold 99 % of them whole"]


def _sameness(gate: ExampleFilter) -> list[str]:
    """An answer that most rows share is soon the only one the model gives."""
    if gate.kept < FEW_ROWS:
        return []
    _, counts = np.unique(np.asarray(gate.answers, dtype=np.uint64), return_counts=True)
    share = counts.max() / gate.kept
    text = "of the rows have the very same answer: the model may learn to say nothing else"
    return [f"{share:.0%} {text}"] if share > ONE_ANSWER else []
