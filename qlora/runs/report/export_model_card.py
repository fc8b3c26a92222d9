"""README.md of an export, a model card: exported models and adapters, resized and combined adapters."""

from collections.abc import Mapping
from typing import Any

from qlora.runs.report.model_card import (
    Loading,
    base_warning,
    front_matter,
    is_hub_name,
    loading_section,
    model_front_matter,
    model_loading_section,
    recipe_section,
    storage,
    training_section,
)
from qlora.runs.report.run_data import number, section, string

PEFT_FORMAT = ("adapter", "portable")
ADAPTERS = (*PEFT_FORMAT, "mlx", "gguf-adapter")  # targets that are no whole models
TITLES = {
    "adapter": "A LoRA adapter",
    "portable": "A portable LoRA adapter",
    "mlx": "An adapter for mlx-lm",
    "gguf-adapter": "A LoRA adapter for llama.cpp",
}
MLX = "In the format of mlx-lm: one rank, the scale in B, the same updates as in training."
PORTABLE = [
    "The adapter with its scale folded into B, all layers of one rank, alpha = rank, no rsLoRA and no patterns: "
    "the same updates in every program that reads PEFT's format.",
]


def export_model_card(
    manifest: Mapping[str, Any], recipe_text: str, facts: Mapping[str, Any], servers: str, loading: Loading
) -> str:
    """The model card of an export: how it was trained, what was written, how exact that is, and which servers read it.

    `facts` has to, base, dtype, and for a model agreement and rounding; `servers` is the table with placeholders.
    """
    base = string(manifest, "base", "name")
    name = base if is_hub_name(base) else "a local base model"
    is_model = facts["to"] not in ADAPTERS
    head = model_front_matter(base, facts["to"] == "merged") if is_model else front_matter(base)
    content = _merge(manifest, facts) if is_model else [*_adapter(manifest, facts), *base_warning(manifest)]
    lines = [*head, f"# {_title(facts['to'])} of {name}", "", *content, ""]
    if manifest:
        lines += training_section(manifest)
    lines += ["## Servers", "", "```", servers, "```", ""]
    if facts["to"] in PEFT_FORMAT:
        lines += loading_section(name, loading)
    elif facts["to"] == "merged":
        lines += model_loading_section()
    lines += recipe_section(recipe_text)
    sha256 = string(manifest, "base", "sha256")
    return "\n".join([*lines, *([f"The base model's fingerprint is sha256 `{sha256}`.", ""] if sha256 else [])])


def _adapter(manifest: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    adapter = section(manifest, "adapter")
    trained = [f"Trained as {adapter.get('kind', 'LoRA')}, rank {adapter.get('rank')}, alpha {adapter.get('alpha')}."]
    if facts["to"] == "portable":
        return _portable(facts)
    return [*(trained if adapter else []), *([MLX] if facts["to"] == "mlx" else [])]


def _portable(facts: Mapping[str, Any]) -> list[str]:
    error, rank = number(facts, "shortened", "error"), number(facts, "shortened", "rank")
    if error is None:
        return PORTABLE
    agreement = section(facts, "agreement")
    lines = [
        f"Trained with DoRA, written as the nearest LoRA of rank {rank:.0f}: {100 * error:.2f} % of the updates' norm "
        "is missing. All layers have one rank, alpha = rank: the same in every program that reads PEFT's format.",
    ]
    if not agreement:
        return lines
    top1, kl = 100 * agreement["top1"], agreement["mean_kl"]
    summary = f"Compared with the trained model: top-1 agreement {top1:.2f} %, mean KL {kl:.2e} nats"
    return [*lines, "", f"{summary}, on {agreement['rows']} held-out examples."]


def _title(target: str) -> str:
    return TITLES.get(target, "A fine-tuned model")


def _merge(manifest: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    """What was merged into what, and the certificate."""
    bases = {
        "dequantized": f"the dequantized base model of training (stored as {storage(manifest)})",
        "original": "the base model's original weights, which were not used in training",
    }
    lines = [f"LoRA updates added to {bases[facts['base']]}, summed in float32, stored in {facts['dtype']}."]
    if string(manifest, "adapter", "kind") == "full":
        lines = [f"Every weight was trained; stored in {facts['dtype']}."]
    agreement = section(facts, "agreement")
    if agreement:
        lines += [
            "",
            "Compared with the trained model, on held-out examples:",
            "",
            "| top-1 agreement | mean KL (nats) | max logit difference | loss, trained | loss, written | examples |",
            "|---|---|---|---|---|---|",
            f"| {100 * agreement['top1']:.2f} % | {agreement['mean_kl']:.2e} | "
            f"{agreement['max_logit_difference']:.2e} | {agreement['trained_loss']:.4f} | "
            f"{agreement['written_loss']:.4f} | {agreement['rows']} |",
        ]
    lost = number(facts, "rounding", "lost") or None
    return lines if lost is None else [*lines, "", f"{100 * lost:.1f} % of the updates was lost to rounding."]


def derived_model_card(manifest: Mapping[str, Any], loading: Loading) -> str:
    """The model card of a resized or combined adapter: its sources, without their folders, and the error."""
    base, sha256 = string(manifest, "base", "name"), string(manifest, "base", "sha256")
    name = base if is_hub_name(base) else "a local base model"
    resized, sources = section(manifest, "resized"), manifest.get("parts")
    if resized:
        energy = number(manifest, "resized", "energy_kept")
        kept = "" if energy is None else f" It holds {100 * energy:.2f} % of that adapter's energy (squared norm)."
        origin = [f"The best approximation, matrix by matrix, of an adapter of rank {resized.get('rank')}.{kept}"]
    else:
        origin = ["The weighted sum of the updates of several adapters:", ""]
        rows = sources if isinstance(sources, list) else []
        origin += [f"- {source['name']}, weight {source['weight']:g}" for source in rows]
    return "\n".join(
        [
            *front_matter(base),
            f"# A LoRA adapter for {name}",
            "",
            f"Rank {string(manifest, 'adapter', 'rank')}, its scale folded into B (alpha = rank).",
            "",
            *origin,
            "",
            "It was not trained further, and not evaluated.",
            "",
            *loading_section(name, loading),
            *([f"The base model's fingerprint is sha256 `{sha256}`."] if sha256 else []),
            "",
        ]
    )
