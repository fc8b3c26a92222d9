"""What to do about a record that can't be trained on: one line for each reason, after the detail in every message."""

from collections.abc import Mapping

TEMPLATE = "Name a template that does in model.chat_template, or change the record"
REMEDIES: Mapping[str, str] = {
    # the file
    "record too large": "Split it into several records",
    "not JSON": "Write one JSON object on each line",
    "not UTF-8": "Save the file as UTF-8",
    "not an object": "Write the record as an object: {field: value, ...}",
    "not a table row": "Close every quote; a quote inside a quoted cell is doubled",
    "wrong number of columns": "Quote cells that have a separator or a line break in them",
    "missing column": "Correct the names in `columns` of this data set",
    "more than one value on the line": "Write one object on each line",
    "duplicate key": "Keep one of them",
    "nested too deep": "Store deeper values as JSON text",
    "NUL character": "Remove it",
    "NaN or Infinity": "Write null, or a number",
    "number out of range": "Write it as text, or remove it",
    "lone surrogate": "Write the character in UTF-8, or both halves of the pair",
    # fields
    "no known format": "Name data.format, or rename fields with `columns` of this data set",
    "missing field": "Add it, or rename another with `columns` of this data set",
    "null field": "Give it a text, or remove the record",
    "wrong type": "Change the value, or remove the record",
    "not text": "Remove the part, or the record",
    "unknown role": "Rename it",
    "no messages": "Remove the record, or give it messages",
    "too many turns": "Split the conversation",
    "empty text": "Remove the record",
    "empty answer": "Remove the record, or set train: false in the message",
    "wrong choices": "Correct them",
    "wrong answer": "Correct it",
    "two thoughts": "Keep one of them",
    "unclosed thought": "Close it, or set train: false in the message",
    # preference pairs and feedback
    "different prompts": "Give both sides the same messages up to the answers",
    "identical sides": "Remove the record",
    "tie": "Remove the record",
    "sides exchanged": "Exchange chosen and rejected, or remove the record",
    "wrong label": "Write true or false",
    "answers compared": "Set objective.kind (dpo, ipo, orpo, simpo for pairs; kto for labels), or data.format",
    "no single rendering": "Set model.attention: auto, or give each side one answer",
    # tokens and loss
    "unknown token": "Tokenize with this model's tokenizer",
    "labels don't fit": "Give each token its own id or -100 as label",
    "loss mask does not fit": "Give one flag for each",
    "nothing to train": "Remove the record, or change what masks its answers",
    "nothing left to train": "Raise data.max_length, or shorten the prompt",
    "no assistant turn": "Add an answer, or give plain text as `text`",
    "overlong": "Raise data.max_length, or shorten the record",
    "mask not proved": "Change or remove the characters that the tokenizer does not keep",
    "forged control token": "Change this text: it reads as a control token",
    # the chat template
    "refused by the chat template": "Change the record, or name another template in model.chat_template",
    "takes too long to render": "Shorten the record, or name another template in model.chat_template",
    "takes too much memory to render": "Shorten the record, or name another template in model.chat_template",
    "takes too long to tokenize": "Split the conversation, or name another template in model.chat_template",
    "prefix not kept": "Name another template in model.chat_template",
    "the template does not write tools": TEMPLATE,
    "the template does not write tool calls": TEMPLATE,
    "the template does not write tool arguments": TEMPLATE,
}


def with_remedy(reason: str, detail: str) -> str:
    """`reason: detail. What to do`. A reason without a line in the table has the remedy in its detail."""
    message = f"{reason}: {detail}" if detail else reason
    remedy = REMEDIES.get(reason)
    return f"{message.rstrip('.')}. {remedy}" if remedy else message
