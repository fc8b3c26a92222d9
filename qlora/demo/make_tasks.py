"""The conversations that the embedded base has seen: questions about purchases, answered in plain sentences.

The base learns to find a buyer, a city, a thing or a price in a sentence. What it never sees is the line of four fields
that the demo's fine-tune teaches (make_data.py).
"""

from collections.abc import Mapping
from random import Random
from typing import Any

from qlora.demo.make_data import fields_of, sentence_of

Turn = tuple[str, str]  # what the user says, what the assistant answers

QUESTIONS = [
    ("Who was it?", "It was {name}."),
    ("Who paid?", "{name} paid."),
    ("Which city was it?", "It was in {city}."),
    ("Where was that?", "That was in {city}."),
    ("What was bought?", "They bought the {item}."),
    ("Which thing is it?", "It is the {item}."),
    ("How much was it?", "It was {price} {currency}."),
    ("What did it cost?", "It cost {price} {currency}."),
]
REPLIES = [
    "Thank you, {name}. We hope that you like the {item}.",
    "I see. The {item} is a good choice, and {price} {currency} is a fair price.",
    "Noted. How is the weather in {city}?",
]


def task(random: Random) -> Turn:
    """One conversation: a question, two questions, an echo, or a sentence that is only acknowledged."""
    fields = fields_of(random)
    sentence, kind = sentence_of(random, fields), random.random()
    if kind < 0.60:
        question, answer = random.choice(QUESTIONS)
        asked = f"{sentence} {question}" if random.random() < 0.5 else f"{question} {sentence}"
        return asked, answer.format(**fields)
    if kind < 0.72:
        return f"Say it again: {sentence}", sentence
    if kind < 0.84:
        return _two_questions(random, sentence, fields)
    return sentence, random.choice(REPLIES).format(**fields)


def _two_questions(random: Random, sentence: str, fields: Mapping[str, Any]) -> Turn:
    first, second = random.sample(QUESTIONS, 2)
    return f"{sentence} {first[0]} {second[0]}", f"{first[1]} {second[1]}".format(**fields)
