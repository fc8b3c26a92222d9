"""The conversations that the embedded base has seen: questions about purchases, answered in plain sentences.

The base learns to find a buyer, a city, a thing or a price in a sentence. What it never sees is the line of four fields
that the demo's fine-tune teaches (make_data.py).
"""

from random import Random

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


RETOLD = "{name} of {city} got the {item} for {price} {currency}."


def task(random: Random) -> Turn:
    """One conversation: an echo, the same in other words, a question, or a sentence that is only acknowledged.

    Echoes and retellings are most of them: every word of their answers has to be found in the sentence.
    """
    fields = fields_of(random)
    sentence, kind = sentence_of(random, fields), random.random()
    if kind < 0.35:
        return f"Say it again: {sentence}", sentence
    if kind < 0.70:
        return f"Say it in other words: {sentence}", RETOLD.format(**fields)
    if kind < 0.90:
        question, answer = random.choice(QUESTIONS)
        asked = f"{sentence} {question}" if random.random() < 0.5 else f"{question} {sentence}"
        return asked, answer.format(**fields)
    return sentence, random.choice(REPLIES).format(**fields)
