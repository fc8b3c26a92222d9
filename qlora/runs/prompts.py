"""The prompts of `qlora generate`: a text, a JSONL file or stdin, as messages. Imports no torch."""

import sys

from qlora.data.prompt_file import Prompt, read_prompt_file, user_prompt


def read_prompts(prompt: str) -> list[Prompt]:
    """The prompts of a text, of stdin (`-`), or of a JSONL file with `prompt` or `messages` in each line."""
    if prompt == "-":
        return [user_prompt(sys.stdin.read().strip())]
    return read_prompt_file(prompt) if prompt.endswith(".jsonl") else [user_prompt(prompt)]
