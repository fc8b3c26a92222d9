"""The general text of qlora, as examples: what a fine-tune should not forget, and what any base can be measured on."""

from pathlib import Path

from qlora.data.conversations.encoder import Encoder
from qlora.data.types import TEXT, Example, Message

GENERAL = Path(__file__).parent / "general.txt"


def general_examples(encoder: Encoder) -> list[Example]:
    """The general text as plain text, one example per paragraph; every token bears loss."""
    paragraphs = GENERAL.read_text(encoding="utf-8").strip().split("\n\n")
    return [
        encoder.encode(f"general text:{number}", [Message(TEXT, text)]) for number, text in enumerate(paragraphs, 1)
    ]
