"""Loss keys: the names under which the common tools write which messages of a record bear loss. The only table of them.

A message has a flag, a record a list with one flag per message, a tokenized record a list with one flag per token.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import SequenceMatcher, get_close_matches
from typing import Any

from qlora.data.types import TEXT, TOKENS, TOOLS, Message, RecordError

MESSAGE_KEYS = {  # key -> whether 1 or true means that the message bears loss
    "train": True,  # Open Instruct, Tinker
    "training": True,  # Axolotl
    "trainable": True,  # verl
    "weight": True,  # OpenAI, Mistral, Together, Fireworks
    "loss": True,  # ms-swift, XTuner, slime
    "loss_mask": True,  # verl, UI-TARS
    "step_loss_mask": True,  # slime
    "loss_weight": True,  # LLaMA-Factory
    "loss_scale": True,  # ms-swift
    "masked": False,  # torchtune
}
RECORD_KEYS = ("loss_mask", "train_mask", "turn_mask", "loss_masks")  # one flag per message
TOKEN_KEYS = ("loss_mask", "completion_mask", "assistant_masks", "assistant_mask")  # TRL, verl, NeMo: one per token
PART_KEYS = ("train_detail", "training_detail")  # Axolotl: spans within a message
_KEYS_OF_MESSAGE, _KEYS_OF_RECORD = frozenset((*MESSAGE_KEYS, *PART_KEYS)), frozenset(RECORD_KEYS)

ALLOWED = "true, false, 1, 0"
_WORDS = {"mask", "masks", "masked", "masking", "msk", "unmask", "loss", "train", "training", "trainable", "trained",
          "weight", "weights", "ignore", "ignored", "learn", "learnable", "supervise", "supervised"}  # fmt: skip


def message_flag(item: Mapping[str, Any], location: str) -> bool | None:
    """Whether a message bears loss by its own keys; None if it has none. RecordError for other values than 0 and 1."""
    if _KEYS_OF_MESSAGE.isdisjoint(item):
        return None
    part = next((key for key in PART_KEYS if item.get(key)), None)
    if part:
        problem = f"{location}{part} masks a part of a message, which is not supported"
        raise RecordError("loss mask of a part", f"{problem}. Remove it, or mask the message with train: false")
    flags = {key: flag_of(item[key], f"{location}{key}") for key in MESSAGE_KEYS if item.get(key) is not None}
    trained = {key: flag == MESSAGE_KEYS[key] for key, flag in flags.items()}
    if len(set(trained.values())) > 1:
        values = " and ".join(f"{key}: {item[key]!r}" for key in trained)
        raise RecordError("contradictory loss keys", f"{location}{values}. Keep one of them")
    return next(iter(trained.values()), None)


def flag_of(value: Any, name: str) -> bool:
    """The flag that `value` stands for. RecordError unless it is true, false, 1 or 0."""
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    if isinstance(value, int | float):
        raise RecordError("loss weight", f"{name} is {value}; a message bears loss or not. Allowed: {ALLOWED}")
    raise RecordError("wrong type", f"{name} is {value!r:.60}. Allowed: {ALLOWED}")


def with_record_flags(fields: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """`messages` with the flags of the record's own list. RecordError if it does not fit them or contradicts theirs.

    The list has a flag for each message; one for a leading system message may be missing.
    """
    if _KEYS_OF_RECORD.isdisjoint(fields) or any(message.role in (TEXT, TOKENS) for message in messages):
        return messages
    for key in (key for key in RECORD_KEYS if fields.get(key) is not None):
        turns = [index for index, message in enumerate(messages) if message.role != TOOLS]
        flags = _flag_list(fields[key], key)
        if len(flags) == len(turns) - 1 and messages[turns[0]].role == "system":
            turns = turns[1:]
        if len(flags) != len(turns):
            raise RecordError("loss mask does not fit", f"{key} has {len(flags)} flags for {len(turns)} messages")
        messages = list(messages)
        for index, flag in zip(turns, flags, strict=True):
            messages[index] = _flagged(messages[index], flag, f"message {turns.index(index) + 1}: {key}")
    return messages


def _flag_list(value: Any, key: str) -> list[bool]:
    if not isinstance(value, list | tuple):
        kind = type(value).__name__
        raise RecordError("wrong type", f"{key} of the record is {kind}; a list with 1 or 0 per message is expected")
    return [flag_of(item, f"{key}[{number}]") for number, item in enumerate(value)]


def _flagged(message: Message, flag: bool, location: str) -> Message:
    if message.train is not None and message.train != flag:
        raise RecordError("contradictory loss keys", f"{location} is {int(flag)}, the message's own key differs")
    return replace(message, train=flag)


def looks_like_one(key: str, known: Sequence[str]) -> bool:
    """Whether an unread key may be meant as a loss key: by its words, or because it is near one of `known`."""
    words = re.split(r"[^a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower())
    near = get_close_matches(key.lower(), known, n=3, cutoff=0.75)
    return bool(_WORDS.intersection(words)) or any(_is_slip(key.lower(), name) for name in near)


def _is_slip(key: str, name: str) -> bool:
    """Whether a near key is a misspelt one: a letter too much or too few, or swapped ones. `height` is no `weight`."""
    extra = (Counter(key) - Counter(name)).total() + (Counter(name) - Counter(key)).total()
    return extra <= 1 or (key[0] == name[0] and SequenceMatcher(None, key, name).ratio() >= 0.8)


def nearest(key: str, known: Sequence[str]) -> str:
    """`loss_msk (did you mean loss_mask?)`, if a known key is near."""
    near = get_close_matches(key.lower(), [name for name in known if name != key], n=1, cutoff=0.6)
    return f"{key} (did you mean {near[0]}?)" if near else key
