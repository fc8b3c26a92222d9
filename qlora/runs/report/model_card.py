"""README.md of a run folder, a model card: what was trained, on what, how good it is, and how to load it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.runs.report.run_data import number, section, string
from qlora.utils.machine import GIB

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Loading:
    """How PEFT loads an adapter's base: transformers' class, and the rows that its embedding needs before."""

    factory: str = "AutoModelForCausalLM"
    rows: int | None = None

    def lines(self, base: str, adapter: str) -> list[str]:
        """Lines of Python that load base and adapter as `model`."""
        resize = [] if self.rows is None else [f"base.resize_token_embeddings({self.rows})"]
        base_line = f'base = {self.factory}.from_pretrained("{base}")'
        return [base_line, *resize, f'model = PeftModel.from_pretrained(base, "{adapter}")']


def model_card(manifest: Mapping[str, Any], recipe_text: str, loading: Loading = Loading()) -> str:
    """The model card as Markdown with the hub's front matter; a base model that is a local folder is not named."""
    adapter = section(manifest, "adapter")
    if adapter.get("kind") == "full":
        return full_model_card(manifest, recipe_text)
    base = string(manifest, "base", "name")
    name = base if is_hub_name(base) else "a local base model"
    return "\n".join(
        [
            *front_matter(base),
            f"# A {adapter.get('kind', 'LoRA')} adapter for {name}",
            "",
            f"Rank {adapter.get('rank')}, alpha {adapter.get('alpha')}, dropout {adapter.get('dropout')}: "
            f"{_count(adapter.get('trainable_parameters'))} trained parameters and "
            f"{_count(adapter.get('parameters'))} frozen ones, stored as {storage(manifest)}.",
            "",
            *training_section(manifest),
            "Nothing else was evaluated.",
            "",
            *(f"{line}\n" for line in base_warning(manifest)),
            *loading_section(name, loading),
            "`qlora export THIS_FOLDER OUT --to portable` writes the adapter for servers, `--to merged` the whole "
            "model; each lists the servers that load it, and their commands.",
            "",
            *recipe_section(recipe_text),
            f"The base model's fingerprint is sha256 `{string(manifest, 'base', 'sha256')}`; `run.json` has the rest.",
            "",
        ]
    )


def base_warning(manifest: Mapping[str, Any]) -> list[str]:
    """A warning for an adapter that must not be added to the 16-bit base model."""
    init = string(manifest, "adapter", "init")
    if init not in ("pissa", "loftq") or not number(manifest, "adapter", "quantization_error", "error_before"):
        return []
    return [
        f"Trained from init {init} on a base model stored as {storage(manifest)}: the adapter also holds part of the "
        "quantization error. On the 16-bit base model that part counts twice, and the sum is not the model that was "
        "trained. Load the base model as it was stored in training, or merge with `qlora export --to merged`."
    ]


def full_model_card(manifest: Mapping[str, Any], recipe_text: str) -> str:
    """The model card of a run that trained every weight: a model, not an adapter."""
    base = string(manifest, "base", "name")
    count = _count(section(manifest, "adapter").get("trainable_parameters"))
    return "\n".join(
        [
            *model_front_matter(base),
            f"# A fine-tuned model of {base if is_hub_name(base) else 'a local base model'}",
            "",
            f"All {count} parameters were trained, with float32 master weights; stored in "
            f"{string(manifest, 'base', 'dtype')}.",
            "",
            *training_section(manifest),
            "Nothing else was evaluated.",
            "",
            *model_loading_section(),
            *recipe_section(recipe_text),
        ]
    )


def training_section(manifest: Mapping[str, Any]) -> list[str]:
    """How it was trained and how good it is, as far as the manifest has it."""
    data, result = section(manifest, "data"), section(manifest, "result")
    return [
        "## Training",
        "",
        f"{_count(result.get('steps'))} optimizer steps on {_count(data.get('kept'))} of "
        f"{_count(data.get('rows'))} records ({_count(data.get('trained_tokens'))} trained tokens) "
        f"in {_seconds(manifest)}, {_peak(manifest)} of peak memory.",
        "",
        *_losses(result),
    ]


def front_matter(base: str) -> list[str]:
    """The hub's metadata of an adapter; the base model is named only if it has a hub name."""
    lines = ["---", "library_name: peft", "pipeline_tag: text-generation", "tags:", "- lora", "- qlora"]
    if is_hub_name(base):
        lines += [f"- base_model:adapter:{base}", f"base_model: {base}"]
    return [*lines, "---", ""]


def model_front_matter(base: str, is_folder: bool = True) -> list[str]:
    """The hub's metadata of a whole model; is_folder: transformers loads it, which it does not for a GGUF file."""
    library = ["library_name: transformers"] if is_folder else []
    lines = ["---", *library, "pipeline_tag: text-generation", "tags:", "- qlora"]
    lines += [f"base_model: {base}", "base_model_relation: finetune"] if is_hub_name(base) else []
    return [*lines, "---", ""]


def _losses(result: Mapping[str, Any]) -> list[str]:
    before, after = result.get("eval_loss_before"), result.get("eval_loss")
    if not isinstance(before, float) or not isinstance(after, float):
        return []
    return ["| held-out loss | before | after |", "|---|---|---|", f"| | {before:.4f} | {after:.4f} |", ""]


def loading_section(base: str, loading: Loading) -> list[str]:
    """How to load an adapter."""
    name = base if is_hub_name(base) else "BASE"
    return [
        "## Loading",
        "",
        "```python",
        "from peft import PeftModel",
        f"from transformers import {loading.factory}",
        "",
        *loading.lines(name, "THIS_FOLDER"),
        "```",
        "",
        'Or `qlora generate THIS_FOLDER "..."`.',
        "",
    ]


def model_loading_section() -> list[str]:
    """How to load a whole model."""
    return [
        "## Loading",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")',
        "```",
        "",
    ]


def recipe_section(recipe_text: str) -> list[str]:
    """The recipe, without local paths."""
    return ["## Recipe", "", "```yaml", without_local_paths(recipe_text).rstrip(), "```", ""]


def storage(manifest: Mapping[str, Any]) -> str:
    """How the base model was stored in training: `nf4, block 64, double quantization`."""
    layers = section(manifest, "base", "quantized")
    first = next((layer for layer in layers.values() if isinstance(layer, Mapping)), None)
    if first is None:
        return "in its checkpoint"
    terms = [str(first.get("kind", "unknown"))]
    terms += [f"block {first['block']}"] if "block" in first else []
    return ", ".join([*terms, "double quantization"] if first.get("double") else terms)


def without_local_paths(recipe_text: str) -> str:
    """The recipe with absolute paths cut to their last name, because a model card is published."""
    return re.sub(r"(?<![\w.])(?:~|[A-Za-z]:)?(?:[/\\][^\s/\\'\",]+)+[/\\]([^\s/\\'\",]+)", r"\1", recipe_text)


def is_hub_name(name: str) -> bool:
    """Whether the name of a base model is a hub name, not a local folder such as models/base."""
    return bool(HUB_NAME.fullmatch(name)) and not Path(name).exists()


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "?"


def _seconds(manifest: Mapping[str, Any]) -> str:
    seconds = number(manifest, "seconds")
    return "?" if seconds is None else f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 3600:.1f} h"


def _peak(manifest: Mapping[str, Any]) -> str:
    peak = number(manifest, "memory", "peak_bytes")
    return "?" if peak is None else f"{peak / GIB:.2f} GiB"
