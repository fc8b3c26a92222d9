"""Chat templates that write tool calls in the ways of released models, and what they write for one call."""

from typing import Any

_LOOP = (
    "{{%- for m in messages -%}}{{{{- '<|im_start|>' + m.role + '\\n' + (m.content or '') -}}}}"
    "{{%- for call in m.tool_calls or [] -%}}{{%- set c = call.function or call -%}}{call}{{%- endfor -%}}"
    "{{{{- '<|im_end|>\\n' -}}}}{{%- endfor -%}}"
    "{{%- if add_generation_prompt -%}}{{{{- '<|im_start|>assistant\\n' -}}}}{{%- endif -%}}"
)
_TOOLS = "{%- if tools -%}{{- '# Tools\\n' + tools | tojson + '\\n' -}}{%- endif -%}"

CALLS = {  # a family -> how it writes a call `c`
    # Qwen2.5, Hermes: an object inside the object of the call
    "object": """{{- '<tool_call>{"name": "' + c.name + '", "arguments": ' -}}{{- c.arguments | tojson -}}"""
    """{{- '}</tool_call>' -}}""",
    # Mistral: the function as a whole
    "whole": "{{- c | tojson -}}",
    # DeepSeek: strings joined, which refuses an object
    "joined": "{{- c.name + '\\n' + c.arguments + '\\n' -}}",
    # a template that shows what it gets: Python's notation for an object
    "shown": "{{- c.name -}}{{- c.arguments -}}",
    # Qwen3: text as it is, an object as JSON
    "either": "{{- c.name + ' ' -}}{%- if c.arguments is string -%}{{- c.arguments -}}{%- else -%}"
    "{{- c.arguments | tojson -}}{%- endif -%}",
    # Qwen3-Coder, GLM: a parameter after the other, which refuses a text
    "parameters": "{{- '<function=' + c.name + '>' -}}{%- for key, value in c.arguments | items -%}"
    "{{- '<parameter=' + key + '>' -}}{{- value if value is string else value | tojson -}}{%- endfor -%}",
}
TEMPLATES = {family: _TOOLS + _LOOP.format(call=call) for family, call in CALLS.items()}


def expected_call(family: str, name: str, text: str, parsed: dict[str, Any], dumped: str) -> str:
    """What the template must write for a call whose arguments are the JSON `text`, or the object `parsed`.

    dumped: the object as the template's `tojson` writes it.
    """
    parameters = "".join(f"<parameter={key}>{value}" for key, value in parsed.items())
    return {
        "object": f'<tool_call>{{"name": "{name}", "arguments": {dumped}}}</tool_call>',
        "whole": f'{{"name": "{name}", "arguments": {dumped}}}',
        "joined": f"{name}\n{text}\n",
        "shown": f"{name}{text}",
        "either": f"{name} {text}",
        "parameters": f"<function={name}>{parameters}",
    }[family]
