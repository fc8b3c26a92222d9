"""What a run leaves in its folder: the adapter as PEFT reads it, tokenizer files, recipe, manifest, card and report."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qlora.runs import full_model
from qlora.adapters import peft_files
from qlora.adapters.full import Full
from qlora.adapters.init import InitResult
from qlora.adapters.inject import Injection
from qlora.adapters.lora import Lora
from qlora.adapters.spectrum import spectrum
from qlora.adapters.switch import adapters_off
from qlora.model.download import tokenizer_files
from qlora.model.generate_tokens import generate
from qlora.model.new_tokens import save_tokenizer
from qlora.model.load_base import Base
from qlora.data.prepare import Prepared
from qlora.data.types import IGNORED
from qlora.distributed.processes import Processes
from qlora.errors import QloraError
from qlora.utils.atomic_files import manifest_of, write_bytes, write_json, write_text
from qlora.memory.meter import peak_bytes
from qlora.memory.planner.memory_plan import Plan
from qlora.recipe.recipe import Recipe, dump
from qlora.runs.report.model_card import model_card
from qlora.runs.report.manifest import run_manifest
from qlora.runs.report.page import RunData, report_page
from qlora.training.checkpoint import Position, restore_adapter
from qlora.training.run_log import read_metrics
from qlora.training.exact_match import question, text_of

SAMPLES, SAMPLE_TOKENS = 3, 48  # held-out rows shown in the report, and tokens of an answer
RECIPE, MANIFEST, CARD, PAGE = "recipe.yaml", "run.json", "README.md", "report.html"


@dataclass(frozen=True)
class RunSetup:
    """What the walk has gathered before the first step."""

    recipe: Recipe
    processes: Processes
    base: Base
    adapter: Lora | Full
    injected: Injection
    data: Prepared
    plan: Plan | None = None
    encoder_sha256: str = ""  # of what decides which tokens a row becomes
    begun: InitResult | None = None  # what the adapters' start did to the error of quantising
    sizes: tuple[int, ...] = ()  # rows of a micro-batch by process; none: the recipe's for all


@dataclass(frozen=True)
class Cost:
    """What a run took: seconds from start to adapter; joules of all cards since the first step, where they tell."""

    seconds: float
    energy_joules: float | None = None


def leave(
    parts: RunSetup, position: Position, cost: Cost, samples: Sequence[Mapping[str, str]] | None = None
) -> Mapping[str, Any]:
    """Write the final adapter and everything that describes it; returns run.json. `samples`: None answers them now."""
    samples = samples_of(parts) if samples is None else samples
    output = Path(parts.recipe.train.output)
    # That of an earlier run here goes first: until the new one is written, this folder is not a finished run.
    (output / MANIFEST).unlink(missing_ok=True)
    write_trained(parts, output)
    own_tokenizer = write_tokenizer(parts, output)
    recipe_text = dump(parts.recipe)
    write_text(output / RECIPE, recipe_text)
    kept = {peft_files.WEIGHTS, peft_files.CONFIG, RECIPE, *own_tokenizer}
    if isinstance(parts.adapter, Full):
        kept |= {full_model.CONFIG, *(file.name for file in full_model.model_files(output))}
    files = {name: digest for name, digest in manifest_of(output).items() if name in kept}
    described = describe(parts, position) | {"seconds": round(cost.seconds, 3), "energy_joules": cost.energy_joules}
    described |= {"files": files, "samples": samples, "spectrum": spectra_of(output)}
    manifest = run_manifest(described, parts.processes.device, parts.processes.world)
    write_json(output / MANIFEST, manifest)
    write_text(output / CARD, model_card(manifest, recipe_text))
    _draw(output, manifest, recipe_text)
    return manifest


def write_tokenizer(parts: RunSetup, folder: Path) -> list[str]:
    """The base's tokenizer, byte for byte, or with the new tokens in it; returns its files' names."""
    if parts.recipe.adapter.new_tokens:
        return save_tokenizer(parts.base.tokenizer, folder)
    files = tokenizer_files(parts.base.folder.path)
    for file in files:
        write_bytes(folder / file.name, file.read_bytes())
    return [file.name for file in files]


def draw_running(parts: RunSetup, steps: int) -> None:
    """report.html as far as the run of `steps` steps is; a disk that refuses it does not end the run."""
    described = describe(parts, Position()) | {"result": {}, "running": {"steps": steps}}
    manifest = run_manifest(described, parts.processes.device, parts.processes.world)
    with suppress(QloraError):
        _draw(Path(parts.recipe.train.output), manifest, dump(parts.recipe))


def _draw(output: Path, manifest: Mapping[str, Any], recipe_text: str) -> None:
    run = RunData(output.name, manifest, read_metrics(output), recipe_text, manifest.get("samples", ()))
    write_text(output / PAGE, report_page([run]))


def spectra_of(folder: Path) -> dict[str, dict[str, float]]:
    """What each update uses of its rank, by module path: the figures of `qlora inspect`; nothing without an adapter."""
    if not (folder / peft_files.WEIGHTS).is_file():
        return {}
    file = peft_files.read(folder)
    found = {}
    for path, (a, b) in file.pairs.items():
        each = spectrum(a, b, peft_files.settings(file, path, a.shape[0]).scaling)
        found[path] = {
            "rank": each.rank,
            "energy_90_rank": each.energy_rank(0.90),
            "stable_rank": round(each.stable_rank, 3),
            "norm": float(f"{each.norm:.4g}"),
        }
    return found


def samples_of(parts: RunSetup) -> list[dict[str, str]]:
    """A few held-out rows as the base answers them and as the trained model does, greedily."""
    rows = [row for row in parts.data.eval if row.labels[0] == IGNORED][:SAMPLES]
    asked = [question(row, parts.base.tokenizer) for row in rows]
    if not asked:
        return []
    prompts = [each.prompt_ids for each in asked]
    after = generate(parts.base, prompts, SAMPLE_TOKENS)
    before: list[list[int]] = [[] for _ in prompts]  # of a model all of whose weights moved there is no base left
    if not isinstance(parts.adapter, Full):
        with adapters_off(parts.base.model):
            before = generate(parts.base, prompts, SAMPLE_TOKENS)
    words = [[text_of(ids, parts.base.tokenizer) for ids in many] for many in (prompts, before, after)]
    named = zip(asked, *words, strict=True)
    return [{"prompt": p, "reference": each.reference, "before": b, "after": a} for each, p, b, a in named]


def write_trained(parts: RunSetup, folder: Path, final: bool = True) -> None:
    """What trained, as it is now: an adapter in PEFT's format; or the model, in a checkpoint its float32 masters."""
    if isinstance(parts.adapter, Full):
        return full_model.write(folder, parts.base, parts.base.dtype if final else torch.float32)
    manifest = parts.base.manifest
    identity = peft_files.Identity(manifest.name, manifest.revision, manifest.sha256)
    return peft_files.write(folder, parts.base.model, parts.adapter, identity)


def restore_trained(parts: RunSetup, folder: Path) -> None:
    """What trains, back as a checkpoint has it."""
    if isinstance(parts.adapter, Full):
        return full_model.fill(folder, parts.base.model)
    return restore_adapter(folder, parts.base.model)


def describe(parts: RunSetup, position: Position) -> dict[str, Any]:
    """The parts of run.json that this run made."""
    report, injected = parts.data.report, parts.injected
    return {
        "base": parts.base.manifest.as_json(),
        "adapter": {
            "kind": parts.recipe.adapter.kind,
            **asdict(parts.adapter),
            "init": parts.recipe.adapter.init or "default",
            "quantization_error": asdict(parts.begun) if parts.begun else None,
            "trainable_parameters": injected.trainable_parameters,
            "parameters": injected.parameters,
            "paths": list(injected.paths),
            "whole": list(injected.whole),
        },
        "data": report.counts(),
        "result": result_of(parts, position),
        "memory": {
            "planned_bytes": parts.plan.peak_bytes if parts.plan else None,
            "peak_bytes": peak_bytes(parts.processes.device),
            "owners": dict(parts.plan.owners) if parts.plan else None,
        },
    }


def result_of(parts: RunSetup, position: Position) -> dict[str, Any]:
    """Losses at the start and the end, and how many steps it took."""
    evaluations = [line for line in read_metrics(Path(parts.recipe.train.output)) if line.get("event") == "eval"]
    return {
        "steps": position.step,
        "loss": position.loss,
        "eval_loss": position.eval_loss,
        "eval_loss_before": evaluations[0].get("eval_loss") if evaluations else None,
        "best_eval_loss": position.best_loss,
        "best_step": position.best_step,
        "skipped_steps": position.skipped_steps,
    }
