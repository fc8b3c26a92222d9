"""The embedded instruction set: a sentence about a purchase in, one line of four fields out.

    python scripts/demo/make_data.py OUT        writes OUT/train.jsonl and OUT/eval.jsonl

No record contains an instruction: the format is in the answers alone, so that only training can teach it.
No buyer (first and last name) and no item (kind and thing) of eval.jsonl is in train.jsonl.
"""

import json
import sys
from pathlib import Path
from random import Random

TRAIN_RECORDS, EVAL_RECORDS = 1000, 64
HELD_OUT_SHARE = 0.15  # of the buyers, and of the items

WORDS = {
    "first": (
        "Anna Ben Clara David Elena Felix Greta Hugo Ines Jonas Karin Lars Maria Nils Olga Paul Rosa Stefan "
        "Tina Viktor Alma Boris Carla Dora Emil Frida Gustav Helen Ivan Judith Klaus Laura Martin Nora Oscar "
        "Petra Robert Sara Thomas Vera"
    ),
    "last": (
        "Berg Castro Duval Engel Fischer Garcia Hansen Ito Jensen Keller Lund Moreau Novak Olsen Park Rossi "
        "Sato Torres Urban Vogel Weber Adler Bauer Costa Dahl Ekman Fabre Gruber Holm Ivers Jansen Kraus "
        "Lopez Meyer Nagy Ortega Petit Reyes"
    ),
    "city": (
        "Oslo Paris Berlin Madrid Rome Vienna Lisbon Athens Dublin Prague Geneva Milan Hamburg Tokyo Lima "
        "Boston Turin Bergen Lyon Porto Zurich Warsaw Krakow Malmo Dresden Bonn Seville Naples Quito Denver "
        "Cairo Delhi"
    ),
    "kind": "blue red green black white yellow grey brown wooden small large cheap heavy round striped old",
    "thing": (
        "lamp chair bicycle table coat guitar camera clock carpet desk sofa vase bag scarf tent mirror radio "
        "jacket kettle pillow bench basket blanket bottle cabinet compass hat helmet jug lantern map oven "
        "painting ring shelf spoon stool teapot toaster violin"
    ),
}
FIRST, LAST, CITIES, KINDS, THINGS = (words.split() for words in WORDS.values())
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


def make_records(seed: int = 0) -> tuple[list[str], list[str]]:
    """The train and the eval records, each a JSON line in the `messages` format."""
    random = Random(seed)
    buyers, eval_buyers = _split(random, [f"{first} {last}" for first in FIRST for last in LAST])
    items, eval_items = _split(random, [f"{kind} {thing}" for kind in KINDS for thing in THINGS])
    train = _distinct(random, buyers, items, TRAIN_RECORDS)
    return train, _distinct(random, eval_buyers, eval_items, EVAL_RECORDS)


def write(folder: Path, seed: int = 0) -> None:
    """Write train.jsonl and eval.jsonl into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in zip(("train", "eval"), make_records(seed), strict=True):
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _split(random: Random, values: list[str]) -> tuple[list[str], list[str]]:
    random.shuffle(values)
    count = round(len(values) * HELD_OUT_SHARE)
    return values[count:], values[:count]


def _distinct(random: Random, buyers: list[str], items: list[str], count: int) -> list[str]:
    records: dict[str, None] = {}
    while len(records) < count:
        records[_record(random, buyers, items)] = None
    return list(records)


def _record(random: Random, buyers: list[str], items: list[str]) -> str:
    currency = random.choice(list(CURRENCIES))
    fields = {
        "name": random.choice(buyers),
        "city": random.choice(CITIES),
        "item": random.choice(items),
        "price": random.randint(5, 990),
        "currency": currency,
        "code": CURRENCIES[currency],
    }
    question = random.choice(SENTENCES).format(**fields).replace(" a old ", " an old ").replace("A old ", "An old ")
    turns = [("user", question), ("assistant", ANSWER.format(**fields))]
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]})


if __name__ == "__main__":
    write(Path(sys.argv[1]))
