"""README.md of what leaves the house: exported models and adapters, resized and combined ones."""

from collections.abc import Mapping
from typing import Any

from qlora.runs.report.model_card import caution, front_matter, is_hub, loading, stored, training, without_local_paths
from qlora.runs.report.run_data import number, section, word


def exported_card(manifest: Mapping[str, Any], recipe_text: str, facts: Mapping[str, Any], servers: str) -> str:
    """The card of an export: how it was trained, what was written and how close that is, and who takes it.

    `facts` has to, base, dtype, and for a model agreement and rounding; `servers` is the table with placeholders.
    """
    base = word(manifest, "base", "name")
    shown = base if is_hub(base) else "a local base model"
    whole = facts["to"] in ("merged", "ollama")
    head = _model_front_matter(base) if whole else front_matter(base)
    what = _merge(manifest, facts) if whole else [*_portable(facts), *caution(manifest)]
    lines = [*head, f"# {_title(facts['to'])} of {shown}", "", *what, ""]
    if manifest:
        lines += training(manifest)
    lines += ["## Who takes this folder", "", "```", servers, "```", "", *(_using() if whole else loading(shown))]
    lines += ["## Recipe", "", "```yaml", without_local_paths(recipe_text).rstrip(), "```", ""]
    sha = word(manifest, "base", "sha256")
    return "\n".join([*lines, *([f"The base's fingerprint is sha256 `{sha}`.", ""] if sha else [])])


PORTABLE = [
    "The adapter with its scale folded into B, all layers of one rank, alpha = rank, no rsLoRA and no patterns: "
    "the same updates, read alike by every program that reads PEFT's format.",
]


def _portable(facts: Mapping[str, Any]) -> list[str]:
    error, rank = number(facts, "shortened", "error"), number(facts, "shortened", "rank")
    if error is None:
        return PORTABLE
    found = section(facts, "agreement")
    lines = [
        f"Trained with DoRA, written as the nearest LoRA of rank {rank:.0f}: {100 * error:.2f} % of the updates' norm "
        "is missing. All layers have one rank, alpha = rank: every program that reads PEFT's format reads it alike.",
    ]
    if not found:
        return lines
    share, kl = 100 * found["top1"], found["mean_kl"]
    said = f"Against the model that was trained: top-1 agreement {share:.2f} %, mean KL {kl:.2e} nats"
    return [*lines, "", f"{said}, on {found['rows']} rows."]


def _title(target: str) -> str:
    return "A portable LoRA adapter" if target == "portable" else "A fine-tuned model"


def _model_front_matter(base: str) -> list[str]:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- qlora"]
    lines += [f"base_model: {base}", "base_model_relation: finetune"] if is_hub(base) else []
    return [*lines, "---", ""]


def _merge(manifest: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    """What was added to what, and the certificate."""
    onto = {
        "dequantized": f"the base as training saw it (stored as {stored(manifest)})",
        "original": "the base's original weights, which training did not see",
    }
    lines = [f"LoRA updates added to {onto[facts['base']]}, summed in float32, stored in {facts['dtype']}."]
    if word(manifest, "adapter", "kind") == "full":
        lines = [f"Every weight was trained; stored in {facts['dtype']}."]
    found = section(facts, "agreement")
    if found:
        lines += [
            "",
            "Against the model that was trained, on rows it never saw:",
            "",
            "| top-1 agreement | mean KL (nats) | largest logit difference | loss, trained | loss, written | rows |",
            "|---|---|---|---|---|---|",
            f"| {100 * found['top1']:.2f} % | {found['mean_kl']:.2e} | {found['max_logit_difference']:.2e} | "
            f"{found['trained_loss']:.4f} | {found['written_loss']:.4f} | {found['rows']} |",
        ]
    lost = number(facts, "rounding", "lost") or None
    return lines if lost is None else [*lines, "", f"Rounding took {100 * lost:.1f} % of the updates."]


def _using() -> list[str]:
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


def reworked_card(manifest: Mapping[str, Any]) -> str:
    """The card of an adapter that was made out of others: of which, and what that cost; their folders stay at home."""
    base, sha = word(manifest, "base", "name"), word(manifest, "base", "sha256")
    shown = base if is_hub(base) else "a local base model"
    resized, parts = section(manifest, "resized"), manifest.get("parts")
    if resized:
        energy = number(manifest, "resized", "energy_kept")
        kept = "" if energy is None else f" It holds {100 * energy:.2f} % of that adapter's energy (squared norm)."
        origin = [f"The best approximation, matrix by matrix, of an adapter of rank {resized.get('rank')}.{kept}"]
    else:
        rows = parts if isinstance(parts, list) else []
        origin = ["The weighted sum of the updates of several adapters:", ""]
        origin += [f"- {each['name']}, weight {each['weight']:g}" for each in rows]
    return "\n".join(
        [
            *front_matter(base),
            f"# A LoRA adapter for {shown}",
            "",
            f"Rank {word(manifest, 'adapter', 'rank')}, its scale folded into B (alpha = rank).",
            "",
            *origin,
            "",
            "It was not trained further, and not evaluated.",
            "",
            *loading(shown),
            *([f"The base's fingerprint is sha256 `{sha}`."] if sha else []),
            "",
        ]
    )
