"""How many answers and thoughts of a data set are trained, of those that its records have."""

from qlora.data.conversations.build_example import Encoded
from qlora.data.occurrences import Occurrences
from qlora.data.types import TEXT, TOKENS

_WHY = "the chat template refuses the messages as they are. Inference must send them in the same form"
MANY_LEFT_OUT = 0.1  # a fraction above this is a warning at the top


class AnswerCounter:
    """Counts the answers and thoughts of the kept conversations of a data set."""

    def __init__(self) -> None:
        self.answers = self.trained_answers = self.thoughts = self.trained_thoughts = 0
        self._merges: dict[str, Occurrences] = {}  # a rule -> the records to which it was applied

    def add(self, encoded: Encoded, left_out: int = 0) -> None:
        """Count one record. left_out: its answers that are above data.max_length."""
        if encoded.kind in (TEXT, TOKENS):
            return
        counts = encoded.answers
        for rule in counts.merges:
            self._merges.setdefault(rule, Occurrences()).add(encoded.example.where)
        self.answers += counts.total
        self.trained_answers += counts.trained - left_out
        self.thoughts += counts.thoughts
        self.trained_thoughts += max(0, counts.trained_thoughts - left_out)

    def warnings(self) -> list[str]:
        """A warning if many answers are left out, and one for each rule by which messages were changed."""
        merges = [records.describe(f"trained with {rule}: {_WHY}") for rule, records in self._merges.items()]
        lost = self.answers - self.trained_answers
        if lost <= MANY_LEFT_OUT * self.answers:
            return merges
        reasons = "they are above data.max_length, or their prompt is not the beginning of their rendering"
        remedies = "Raise data.max_length, or name another template in model.chat_template"
        return [f"{lost:,} of {self.answers:,} answers are NOT trained: {reasons}. {remedies}", *merges]


def summary_of(answers: int, trained_answers: int, thoughts: int, trained_thoughts: int) -> list[str]:
    """One line with the counts; none for data without answers."""
    parts = [f"answers trained: {trained_answers:,} of {answers:,}"] if answers else []
    parts += [f"thoughts trained: {trained_thoughts:,} of {thoughts:,}"] if thoughts else []
    return [" · ".join(parts)] if parts else []
