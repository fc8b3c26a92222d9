"""README.md of an adapter folder: what it is, what it learnt, how good it got, and how to load it."""

import re
from collections.abc import Mapping
from typing import Any

from qlora.runs.report.run_data import number, section, word

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def model_card(manifest: Mapping[str, Any], recipe_text: str) -> str:
    """The card as Markdown with the hub's front matter; base and data sets are named only where they are hub names."""
    base = word(manifest, "base", "name")
    shown = base if is_hub(base) else "a local base model"
    adapter = section(manifest, "adapter")
    if adapter.get("kind") == "full":
        return whole_card(manifest, recipe_text)
    return "\n".join(
        [
            *front_matter(base),
            f"# A {adapter.get('kind', 'LoRA')} adapter for {shown}",
            "",
            f"Rank {adapter.get('rank')}, alpha {adapter.get('alpha')}, dropout {adapter.get('dropout')}: "
            f"{_count(adapter.get('trainable_parameters'))} trained parameters beside "
            f"{_count(adapter.get('parameters'))} frozen ones, stored as {stored(manifest)}.",
            "",
            *training(manifest),
            "Nothing beyond that was evaluated.",
            "",
            *(f"{line}\n" for line in caution(manifest)),
            *loading(shown),
            "## Recipe",
            "",
            "```yaml",
            without_local_paths(recipe_text).rstrip(),
            "```",
            "",
            f"The base's fingerprint is sha256 `{word(manifest, 'base', 'sha256')}`; `run.json` has the rest.",
            "",
        ]
    )


def caution(manifest: Mapping[str, Any]) -> list[str]:
    """What a user of the adapter must know of the base it is added to, where that is not any base."""
    init = word(manifest, "adapter", "init")
    if init not in ("pissa", "loftq") or not number(manifest, "adapter", "quantization_error", "error_before"):
        return []
    return [
        f"Trained from init {init} on a base stored as {stored(manifest)}: the adapter also holds part of what storing "
        "it so took away. On the 16-bit base that part counts twice, and the sum is not the model that was trained. "
        "Load the base as it was stored in training, or merge with `qlora export --to merged`."
    ]


def whole_card(manifest: Mapping[str, Any], recipe_text: str) -> str:
    """The card of a run that trained every weight: a model, not an adapter."""
    base = word(manifest, "base", "name")
    hub = [f"base_model: {base}", "base_model_relation: finetune"] if is_hub(base) else []
    count = _count(section(manifest, "adapter").get("trainable_parameters"))
    return "\n".join(
        [
            *(
                "---",
                "library_name: transformers",
                "pipeline_tag: text-generation",
                "tags:",
                "- qlora",
                *hub,
                "---",
                "",
            ),
            f"# A fine-tuned model of {base if is_hub(base) else 'a local base model'}",
            "",
            f"All {count} parameters were trained, float32 masters, stored in {word(manifest, 'base', 'dtype')}.",
            "",
            *training(manifest),
            "Nothing beyond that was evaluated.",
            "",
            *("## Loading", "", "```python", "from transformers import AutoModelForCausalLM", ""),
            *('model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")', "```", ""),
            *("## Recipe", "", "```yaml", without_local_paths(recipe_text).rstrip(), "```", ""),
        ]
    )


def training(manifest: Mapping[str, Any]) -> list[str]:
    """How it was trained and how well it did, as far as the manifest says."""
    data, result = section(manifest, "data"), section(manifest, "result")
    return [
        "## Training",
        "",
        f"{_count(result.get('steps'))} optimizer steps on {_count(data.get('kept'))} of "
        f"{_count(data.get('rows'))} rows ({_count(data.get('trained_tokens'))} trained tokens) "
        f"in {_seconds(manifest)}, {_peak(manifest)} of memory at the peak.",
        "",
        *_losses(result),
    ]


def front_matter(base: str) -> list[str]:
    """What the hub reads of an adapter; the base is named only where it is a hub name."""
    lines = ["---", "library_name: peft", "pipeline_tag: text-generation", "tags:", "- lora", "- qlora"]
    if is_hub(base):
        lines += [f"- base_model:adapter:{base}", f"base_model: {base}"]
    return [*lines, "---", ""]


def _losses(result: Mapping[str, Any]) -> list[str]:
    before, after = result.get("eval_loss_before"), result.get("eval_loss")
    if not isinstance(before, float) or not isinstance(after, float):
        return []
    return ["| held-out loss | before | after |", "|---|---|---|", f"| | {before:.4f} | {after:.4f} |", ""]


def loading(base: str) -> list[str]:
    """How an adapter is loaded."""
    name = base if is_hub(base) else "BASE"
    return [
        "## Loading",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{name}"), "THIS_FOLDER")',
        "```",
        "",
        f'`qlora generate THIS_FOLDER "..."`, or `vllm serve {name} --enable-lora --lora-modules mine=THIS_FOLDER`.',
        "",
    ]


def stored(manifest: Mapping[str, Any]) -> str:
    """How the base was stored in training, in words."""
    layers = section(manifest, "base", "quantized")
    first = next((layer for layer in layers.values() if isinstance(layer, Mapping)), {})
    parts = [str(first.get("kind", "they came"))]
    parts += [f"block {first['block']}"] if "block" in first else []
    return ", ".join([*parts, "double quantisation"] if first.get("double") else parts)


def without_local_paths(recipe_text: str) -> str:
    """The recipe with absolute paths cut to their last name: a card goes out, a home folder should not."""
    return re.sub(r"(?<![\w.])(?:~|[A-Za-z]:)?(?:[/\\][^\s/\\'\",]+)+[/\\]([^\s/\\'\",]+)", r"\1", recipe_text)


def is_hub(name: str) -> bool:
    """Whether a base's name is one of the hub's, rather than a folder here."""
    return bool(HUB_NAME.fullmatch(name))


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "?"


def _seconds(manifest: Mapping[str, Any]) -> str:
    seconds = number(manifest, "seconds")
    return "?" if seconds is None else f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 3600:.1f} h"


def _peak(manifest: Mapping[str, Any]) -> str:
    peak = number(manifest, "memory", "peak_bytes")
    return "?" if peak is None else f"{peak / 2**30:.2f} GiB"
