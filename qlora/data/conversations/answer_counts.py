"""Counts of a record's answers and thoughts: how many are to be trained, how many are, and why none is."""

from collections.abc import Mapping, Sequence

from qlora.data.conversations.build_example import AnswerCounts
from qlora.data.conversations.chat_messages import Conversation
from qlora.data.conversations.text_paths import MaskedText
from qlora.data.types import TOOLS, Message, RecordError


def answer_counts(
    messages: Sequence[Message], conversation: Conversation, masked: MaskedText, thoughts: Mapping[int, str]
) -> tuple[AnswerCounts, tuple[str, ...]]:
    """The counts of a record, and where it has the thoughts that the template does not write.

    thoughts: for the index of each message with a thought, where the record has it; empty if the template gets it.
    """
    if not thoughts and not masked.unlocated:  # the usual case
        count = sum(conversation.trained)
        return AnswerCounts(count, count), ()
    turn_of = {index: turn for turn, index in enumerate(i for i, m in enumerate(messages) if m.role != TOOLS)}
    selected = {turn for turn, trained in enumerate(conversation.trained) if trained}
    forms = {turn_of[index]: form for index, form in thoughts.items() if turn_of[index] in selected}
    located = selected - {*masked.unlocated}
    trained = [turn for turn, form in forms.items() if not form and turn in located and turn not in masked.unthought]
    lost = {form or "handed to the template" for turn, form in forms.items() if form or turn in masked.unthought}
    return AnswerCounts(len(selected), len(located), len(forms), len(trained)), tuple(sorted(lost))


def nothing_to_train(conversation: Conversation, masked: MaskedText) -> RecordError:
    """Why no answer of a conversation is trained."""
    if len(conversation.turns) == 1 and conversation.trained[0]:
        return RecordError("no prompt", 'the only message is the assistant\'s. As plain text it is {"text": ...}')
    if any(conversation.trained[i] for i in masked.unlocated):
        detail = "the template's prompt for the answer is not the beginning of its rendering with the answer"
        return RecordError("prefix not kept", detail)
    if not any(turn["role"] == "assistant" for turn in conversation.turns):
        return RecordError("no assistant turn")
    return RecordError("nothing to train", "data.train_on and the record's own loss keys select no answer")
