"""The embedded instruction set: a sentence about a purchase in, one line of four fields out.

    python -m qlora.demo.make_data OUT        writes OUT/train.jsonl and OUT/eval.jsonl

Nothing in a row says what to do with the sentence: the behaviour is in the answers alone; only training can show it.
No buyer (first and family name together) and no item (colour and thing together) of eval.jsonl is in train.jsonl.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

TRAIN_ROWS, EVAL_ROWS = 1000, 64
HELD_OUT_SHARE = 0.15  # of the buyers, and of the items

WORDS = {
    "first": "Anna Ben Clara David Elena Felix Greta Hugo Ines Jonas Karin Lars Maria Nils Olga Paul Rosa Stefan Tina",
    "last": "Berg Castro Duval Engel Fischer Garcia Hansen Ito Jensen Keller Lund Moreau Novak Olsen Park Rossi Sato",
    "city": "Oslo Paris Berlin Madrid Rome Vienna Lisbon Athens Dublin Prague Geneva Milan Hamburg Tokyo Lima Boston",
    "colour": "blue red green black white yellow grey brown orange",
    "thing": "lamp chair bicycle table coat guitar camera clock carpet desk sofa vase bag scarf tent",
}
FIRST, LAST, CITIES, COLOURS, THINGS = (words.split() for words in WORDS.values())
BUYERS = [f"{first} {last}" for first in FIRST for last in LAST]
ITEMS = [f"{colour} {thing}" for colour in COLOURS for thing in THINGS]
CURRENCIES = {"euros": "EUR", "dollars": "USD", "pounds": "GBP", "francs": "CHF"}

SENTENCES = [
    "{name} from {city} paid {price} {currency} for the {item}.",
    "{name} from {city} bought a {item} for {price} {currency}.",
    "In {city}, {name} bought the {item} for {price} {currency}.",
    "For {price} {currency}, {name} of {city} bought the {item}.",
    "The {item} was sold to {name} from {city} for {price} {currency}.",
    "Our shop in {city} sold a {item} to {name}, who paid {price} {currency}.",
    "We sent the {item} to {name} in {city} and received {price} {currency}.",
    "A {item} costs {price} {currency}, and {name} in {city} ordered one.",
]
ANSWER = "name: {name}; city: {city}; item: {item}; price: {price} {code}"


def fields_of(random: Random, buyers: Sequence[str] = BUYERS, items: Sequence[str] = ITEMS) -> dict[str, Any]:
    """A purchase: who, where, what, and for how much."""
    currency = random.choice(list(CURRENCIES))
    return {
        "name": random.choice(buyers),
        "city": random.choice(CITIES),
        "item": random.choice(items),
        "price": random.randint(5, 990),
        "currency": currency,
        "code": CURRENCIES[currency],
    }


def sentence_of(random: Random, fields: Mapping[str, Any]) -> str:
    """A purchase in words."""
    text = random.choice(SENTENCES).format(**fields)
    return text.replace(" a orange", " an orange").replace("A orange", "An orange")


def rows(seed: int = 0) -> tuple[list[str], list[str]]:
    """The training and the held-out rows, each one JSON line in the `messages` format."""
    random = Random(seed)
    buyers, held_buyers = _split(random, BUYERS)
    items, held_items = _split(random, ITEMS)
    train = _distinct(random, buyers, items, TRAIN_ROWS)
    return train, _distinct(random, held_buyers, held_items, EVAL_ROWS)


def write(folder: Path, seed: int = 0) -> None:
    """Write train.jsonl and eval.jsonl into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in zip(("train", "eval"), rows(seed), strict=True):
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _split(random: Random, values: Sequence[str]) -> tuple[list[str], list[str]]:
    shuffled = random.sample(values, len(values))
    held = round(len(values) * HELD_OUT_SHARE)
    return shuffled[held:], shuffled[:held]


def _distinct(random: Random, buyers: Sequence[str], items: Sequence[str], count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[_row(random, buyers, items)] = None
    return list(found)


def _row(random: Random, buyers: Sequence[str], items: Sequence[str]) -> str:
    fields = fields_of(random, buyers, items)
    turns = [("user", sentence_of(random, fields)), ("assistant", ANSWER.format(**fields))]
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]})


if __name__ == "__main__":
    write(Path(sys.argv[1]))
