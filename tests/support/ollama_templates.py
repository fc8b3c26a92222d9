"""Chat templates for Ollama: those that its language can express, those that it can't, and conversations to render."""

from collections.abc import Sequence
from pathlib import Path

from qlora.data.conversations.chat_template import PLAIN, Template
from support.tiny_models import CHATML, byte_tokenizer

GEMMA3 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{{ (first if loop.first else '') + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}{% set system = '<<SYS>>\n' + "
    "messages[0]['content'] + '\n<</SYS>>\n\n' %}{% else %}{% set turns = messages %}{% set system = '' %}{% endif %}"
    "{% for m in turns %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') + "
    "m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are kind.<|im_end|>\n{% endif %}" + CHATML
)
FILES = {path.stem: path.read_text(encoding="utf-8") for path in (Path(__file__).parent / "templates").glob("*.jinja")}
TRANSLATABLE = {
    **FILES, "gemma3": GEMMA3, "llama2": LLAMA2, "default system": DEFAULT_SYSTEM, "plain": PLAIN,
    "braces": CHATML.replace("<|im_start|>", "{{ '{{' }}<|im_start|>"),
}  # fmt: skip
NUMBERED = "{% for m in messages %}{{ loop.index }}. {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
UPPER_CASE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | upper }}\n{% endfor %}"
INNER_BLANKS = CHATML.replace("m['content']", "m['content'].replace('  ', ' ')")

TEXTS = (
    "one two", "  hi  ", "line\nline", "\nbefore", "after\n\n", "{{ .Content }} and {% x %}", 'a "quote"', "\t tab ",
    "é 漢", "a  b\n\n  c",
)  # fmt: skip


def template_of(text: str) -> Template:
    return Template(byte_tokenizer(text), "auto")


def conversations() -> list[list[dict[str, str]]]:
    """20 conversations of 1, 3, 5 and 7 messages, half of them after a system message, with blanks and line ends."""
    result = []
    for number in range(20):
        length = (1, 3, 5, 7)[number // 2 % 4]
        texts = [TEXTS[(number + step * (number % 3 + 1)) % len(TEXTS)] for step in range(length)]
        turns = [{"role": "assistant" if step % 2 else "user", "content": text} for step, text in enumerate(texts)]
        system = {"role": "system", "content": TEXTS[(number + 5) % len(TEXTS)]}
        result.append([system, *turns] if number % 2 else turns)
    return result


def stripped(turns: Sequence[dict[str, str]], roles: Sequence[str]) -> list[dict[str, str]]:
    """The conversation as the Modelfile asks for it: messages of `roles` without blanks at their ends."""
    return [turn | {"content": turn["content"].strip()} if turn["role"] in roles else turn for turn in turns]
