"""The {% generation %} marks of a chat template, compared with the loss mask: a cross-check, never its source."""

from qlora.data.conversations.chat_messages import Conversation
from qlora.data.conversations.chat_template import Template, Turn
from qlora.data.conversations.loss_mask import LossMasker
from qlora.data.conversations.safe_tokenizer import without_whitespace
from qlora.data.types import RecordError

_SAMPLE: list[Turn] = [
    {"role": "user", "content": "Judge my vow."},
    {"role": "assistant", "content": "Sphinx of black quartz"},
]


def differing_marks(template: Template, masker: LossMasker) -> str:
    """A note if the marks cover other text of a sample answer than is trained; empty if they agree."""
    try:
        marked = template.marked_text(_SAMPLE)
        conversation = Conversation(_SAMPLE, template.sample_tools, (False, True), (False, False), "", ())
        path = masker.mask(conversation, train_all=False).paths[0]
    except RecordError:  # the template refuses the sample
        return ""
    trained = "".join(path.text[stretch.start : stretch.end] for stretch in path.stretches)
    if marked is None or without_whitespace(marked) == without_whitespace(trained):
        return ""
    return f"its generation marks cover {marked!r} of a sample answer; trained is what follows the prompt, {trained!r}"
