"""A chat template as transformers compiles it, which renders plain messages as they are: several times faster.

`apply_chat_template` copies a conversation twice, and gathers all names that a template may use, for every rendering.
Messages of a role and a text alone read the same without that. Everything else is left to `apply_chat_template`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

_SAMPLES: Sequence[list[dict[str, str]]] = (
    [{"role": "user", "content": "Judge my vow."}],
    [{"role": "user", "content": "Judge my vow."}, {"role": "assistant", "content": " <think>No</think>\n\nJudged.\n"}],
    [
        {"role": "system", "content": "Be brief."},
        *({"role": role, "content": "Sphinx of black quartz"} for role in ("user", "assistant", "user", "assistant")),
    ],
)


class CompiledTemplate:
    """A compiled Jinja template with its variables."""

    def __init__(self, template: Any, variables: Mapping[str, Any]) -> None:
        self._template = template
        self._names = {**template.globals, "tools": None, "documents": None, **variables}

    def render(self, turns: Sequence[Any], prompt: bool) -> str | None:
        """The text of plain messages; None for others, and where the template refuses them."""
        if type(turns) is not list or not turns or not all(map(_is_plain, turns)):
            return None
        names = {**self._names, "messages": turns, "add_generation_prompt": prompt}
        try:
            return "".join(self._template.root_render_func(self._template.new_context(names, shared=True)))
        except Exception:  # a template is a program: it may raise anything
            return None


def compile_template(tokenizer: Any, text: str, variables: Mapping[str, Any]) -> CompiledTemplate | None:
    """The template `text`; None if samples show that `tokenizer` renders it in another way, or it can't be compiled."""
    try:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        compiled = CompiledTemplate(_compile_jinja_template(text), {**tokenizer.special_tokens_map, **variables})
    except Exception:  # a syntax error, which apply_chat_template reports; or another release of transformers
        return None
    pairs = [(turns, prompt) for turns in _SAMPLES for prompt in (False, True)]
    same = all(compiled.render(*pair) == _rendered(tokenizer, text, variables, *pair) for pair in pairs)
    return compiled if same else None


def _rendered(tokenizer: Any, text: str, variables: Mapping[str, Any], turns: Any, prompt: bool) -> str | None:
    """What transformers writes; None where the template refuses the messages."""
    try:
        return str(
            tokenizer.apply_chat_template(
                turns, chat_template=text, add_generation_prompt=prompt, tokenize=False, **variables
            )
        )
    except Exception:
        return None


def _is_plain(turn: Any) -> bool:
    return type(turn) is dict and len(turn) == 2 and type(turn.get("role")) is str and type(turn.get("content")) is str
