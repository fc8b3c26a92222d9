"""Generated conversations for the embedded base model: repeat, pick, count, questions with answers.

They teach the conversation format, and copying words of a question. Every answer is prose: the format of the demo's
fine-tune (`make_data.py`), its sentences and its names do not occur here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from make_scenes import COLORS, PLACES, SCENES, THINGS, Turn

WORDS = {
    "onset": "b br c ch d dr f fl g gr h j k kl l m n p pr r s sh st t th tr v w y z",
    "vowel": "a e i o u ai ea ee ia o oo",
    "coda": "l m n r s t rd lin na ck nd ra lo vik sen ton",
}
ONSETS, VOWELS, CLOSINGS = (words.split() for words in WORDS.values())
CODAS = ["", "", "", *CLOSINGS]  # a name often ends in its vowel


@dataclass(frozen=True)
class Lexicon:
    """The words of the tasks: frequent words, and (module, summary) pairs."""

    words: Sequence[str]
    modules: Sequence[Turn]


def make_task(random: Random, lexicon: Lexicon) -> Turn:
    """One conversation of two messages."""
    make = random.choices([kind for kind, _ in KINDS], [weight for _, weight in KINDS])[0]
    return make(random, lexicon)


def _name(random: Random) -> str:
    syllables = [random.choice(ONSETS) + random.choice(VOWELS) for _ in range(random.choice([1, 1, 2]))]
    return "".join(syllables).capitalize() + random.choice(CODAS)


def _list(random: Random, lexicon: Lexicon, shortest: int, longest: int) -> list[str]:
    count = random.randint(shortest, longest)
    kinds = [lambda: random.choice(lexicon.words), lambda: _name(random), lambda: str(random.randint(0, 999))]
    weights = random.choice([[1, 0, 0], [0, 1, 0], [2, 2, 1]])
    return [make() for make in random.choices(kinds, weights, k=count)]


def _repeat(random: Random, lexicon: Lexicon) -> Turn:
    words = " ".join(_list(random, lexicon, 2, 14))
    return random.choice(["Repeat: ", "Say this again: ", "Copy these words: "]) + words, words


def _backwards(random: Random, lexicon: Lexicon) -> Turn:
    words = _list(random, lexicon, 2, 5)
    return "Say these words backwards: " + " ".join(words), " ".join(reversed(words))


def _pick(random: Random, lexicon: Lexicon) -> Turn:
    words = _list(random, lexicon, 3, 7)
    place, index = random.choice([("first", 0), ("second", 1), ("third", 2), ("last", -1)])
    return f"What is the {place} word of this list? {' '.join(words)}", f"The {place} word is {words[index]}."


def _after(random: Random, lexicon: Lexicon) -> Turn:
    words = _list(random, lexicon, 3, 8)
    index = random.randrange(len(words) - 1)
    return f"{' '.join(words)}. What comes after {words[index]}?", f"After {words[index]} comes {words[index + 1]}."


def _count(random: Random, lexicon: Lexicon) -> Turn:
    words = _list(random, lexicon, 2, 6)
    return f"How many words are these? {', '.join(words)}", f"These are {len(words)} words."


def _larger(random: Random, lexicon: Lexicon) -> Turn:
    one, two = random.sample(range(10, 1000), 2)
    return f"Which number is larger, {one} or {two}?", f"The larger number is {max(one, two)}."


def _fields(random: Random, lexicon: Lexicon) -> dict[str, str]:
    color, thing, place = (
        random.choice(words if random.random() < 0.3 else lexicon.words) for words in (COLORS, THINGS, PLACES)
    )
    one, two = f"{_name(random)} {_name(random)}", f"{_name(random)} {_name(random)}"
    return {
        "a": one,
        "b": two,
        "f": _name(random),
        "t": _name(random),
        "n": str(random.randint(2, 999)),
        "c": color,
        "o": thing,
        "p": place,
    }


def _question(random: Random, lexicon: Lexicon) -> Turn:
    statement, questions = random.choice(SCENES)
    question, answer = random.choice(questions)
    fields = _fields(random, lexicon)
    return f"{statement} {question}".format(**fields), answer.format(**fields)


def _remember(random: Random, lexicon: Lexicon) -> Turn:
    statement = random.choice(SCENES)[0].format(**_fields(random, lexicon))
    first = statement.split()[0]
    clause = statement[0].lower() + statement[1:] if first in {"A", "The", "In", "Yesterday"} else statement
    return statement, f"Thank you, I will remember that {clause}"


def _module(random: Random, lexicon: Lexicon) -> Turn:
    name, summary = random.choice(lexicon.modules)
    return f"What is the Python module {name}?", summary


def _greeting(random: Random, lexicon: Lexicon) -> Turn:
    return random.choice(
        [
            ("Hello!", "Hello! I am a very small language model. How can I help you?"),
            ("Who are you?", "I am a very small language model that comes with qlora."),
            ("How are you?", "I am fine, thank you."),
            ("Thank you!", "You are welcome."),
        ]
    )


KINDS: list[tuple[Callable[[Random, Lexicon], Turn], float]] = [
    (_repeat, 0.22),
    (_question, 0.34),
    (_remember, 0.14),
    (_after, 0.08),
    (_pick, 0.06),
    (_backwards, 0.05),
    (_count, 0.02),
    (_larger, 0.02),
    (_module, 0.05),
    (_greeting, 0.02),
]
