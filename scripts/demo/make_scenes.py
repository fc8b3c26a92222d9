"""Statements about invented people and things, and questions about them, for make_tasks.py."""

Turn = tuple[str, str]  # user message, assistant message

WORDS = {
    "color": "beige crimson cyan golden lilac pink purple scarlet silver teal turquoise violet",
    "thing": (
        "barrel candle drum feather garden hammer kite ladder letter mirror needle parcel pencil piano rope "
        "saddle shovel stone ticket tower trumpet wagon wheel window"
    ),
    "place": "barn cellar corridor forest harbour kitchen library market museum school stable station valley",
}
COLORS, THINGS, PLACES = (words.split() for words in WORDS.values())

# (statement, [(question, answer), ...]); {a} {b} are full names, {f} a first name, {t} a town.
SCENES: list[tuple[str, list[Turn]]] = [
    (
        "{a} keeps {n} {c} {o} boxes in the {p}.",
        [
            ("Who keeps the boxes?", "{a} keeps the boxes."),
            ("Where are the boxes?", "The boxes are in the {p}."),
            ("How many boxes are there?", "There are {n} boxes."),
            ("What are the boxes like?", "They are {c} {o} boxes."),
        ],
    ),
    (
        "Yesterday {a} of {t} found a {c} {o} near the {p}.",
        [
            ("Who found it?", "{a} found it."),
            ("Where does {a} live?", "{a} lives in {t}."),
            ("What was found?", "It was a {c} {o}."),
            ("What is it like?", "The {o} is {c}."),
        ],
    ),
    (
        "The {c} {o} from {t} weighs {n} pounds and belongs to {a}.",
        [
            ("How much does it weigh?", "It weighs {n} pounds."),
            ("Who owns it?", "{a} owns it."),
            ("Where is it from?", "It is from {t}."),
            ("What is it?", "It is the {c} {o}."),
        ],
    ),
    (
        "In {t}, {a} and {b} walked {n} miles to see a {c} {o}.",
        [
            ("Who walked with {a}?", "{b} walked with {a}."),
            ("How far did they walk?", "They walked {n} miles."),
            ("Where were they?", "They were in {t}."),
            ("What did they see?", "They saw a {c} {o}."),
            ("Name the two people.", "The two people are {a} and {b}."),
        ],
    ),
    (
        "{f} wrote a letter about the {c} {o} to {b} at number {n}, {t}.",
        [
            ("Who wrote the letter?", "{f} wrote the letter."),
            ("Who got the letter?", "{b} in {t} got the letter."),
            ("What is the number?", "The number is {n}."),
            ("What is the letter about?", "It is about the {c} {o}."),
        ],
    ),
    (
        "A {c} {o} lies in the {p} of {a}, who came from {t} {n} days ago.",
        [
            ("What lies there?", "A {c} {o} lies there."),
            ("Whose is the {p}?", "It is the {p} of {a}."),
            ("Where did {a} come from?", "{a} came from {t}."),
            ("How many days ago was that?", "That was {n} days ago."),
        ],
    ),
]
