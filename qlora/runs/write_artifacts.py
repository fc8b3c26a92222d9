"""Write a run's artifacts: adapter in PEFT's format, tokenizer files, recipe, manifest, model card, report.

run.json is written last of the files that describe the adapter: a folder with one is a finished run.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from qlora.adapters import peft_files
from qlora.adapters.full import Full
from qlora.adapters.init import InitResult
from qlora.adapters.inject import Injection
from qlora.adapters.lora import Lora
from qlora.adapters.switch import disable_adapters
from qlora.adapters.update_spectra import update_spectra
from qlora.data.pairs import chosen_answers
from qlora.data.prepare import Prepared
from qlora.data.types import IGNORED
from qlora.distributed.processes import Processes
from qlora.errors import QloraError
from qlora.memory.meter import peak_bytes
from qlora.model import model_folder
from qlora.model.generate_tokens import generate
from qlora.model.load_base import Base
from qlora.model.tokenizer_files import write_tokenizer
from qlora.recipe.recipe import Recipe, dump
from qlora.runs import full_model
from qlora.runs.artifacts import MANIFEST, MODEL_CARD, PAGE, RECIPE, SUSPECT
from qlora.runs.base_loading import loading_of
from qlora.runs.kept_matrices import kept_summary
from qlora.runs.report.manifest import run_manifest
from qlora.runs.report.model_card import model_card
from qlora.runs.report.page import report_page
from qlora.runs.report.run_data import RunData
from qlora.runs.resources import Resources
from qlora.runs.trained_template import SECTION, TrainedEncoder
from qlora.training.checkpoint import Position, restore_adapter
from qlora.training.exact_match import question, text_of
from qlora.training.expert_load import ExpertLoads
from qlora.training.overflow_map import OverflowMap
from qlora.training.run_log import Log, read_metrics
from qlora.utils.atomic_files import sha256_manifest, write_json, write_text
from qlora.utils.atomic_folders import remove
from qlora.utils.out_of_memory import is_out_of_memory

SAMPLES, SAMPLE_TOKENS = 3, 48  # held-out examples in the report, and tokens of an answer


@dataclass(frozen=True)
class RunSetup:
    """A run before its first step: resources, frozen base model, adapter, data."""

    recipe: Recipe
    resources: Resources
    base: Base
    adapter: Lora | Full
    injection: Injection
    data: Prepared
    encoder: TrainedEncoder = field(default_factory=TrainedEncoder)
    init_result: InitResult | None = None  # what the adapters' initialization did to the quantization error
    overflow_map: OverflowMap | None = None  # of float16: which matrices compute in float32
    expert_loads: ExpertLoads = field(default_factory=ExpertLoads)

    @property
    def processes(self) -> Processes:
        """The ranks of the run."""
        return self.resources.processes

    @cached_property
    def recipe_text(self) -> str:
        """The recipe as YAML, with every default."""
        return dump(self.recipe)


@dataclass(frozen=True)
class Cost:
    """What a run used: seconds from start to adapter; joules of all GPUs since the first step, None if not measured."""

    seconds: float
    energy_joules: float | None = None


def write_weights(setup: RunSetup) -> None:
    """Write the final adapter, before anything else that could fail.

    Without run.json the folder does not count as a finished run until `write_artifacts` has written the new one.
    """
    output = Path(setup.recipe.train.output)
    (output / MANIFEST).unlink(missing_ok=True)
    write_trained(setup, output)


def write_artifacts(
    setup: RunSetup, position: Position, cost: Cost, samples: Sequence[Mapping[str, str]]
) -> Mapping[str, Any]:
    """Write the files that describe the final adapter, which is written already; returns run.json."""
    output = Path(setup.recipe.train.output)
    extended_tokenizer = setup.base.tokenizer if setup.recipe.adapter.new_tokens else None
    tokenizer_names = write_tokenizer(output, setup.base.folder.path, extended_tokenizer)
    template_names = setup.encoder.write(output)
    names = {peft_files.WEIGHTS, peft_files.CONFIG, RECIPE, *tokenizer_names, *template_names}
    write_text(output / RECIPE, setup.recipe_text)
    if isinstance(setup.adapter, Full):
        names |= {model_folder.CONFIG, *(file.name for file in model_folder.model_files(output))}
    files = {name: digest for name, digest in sha256_manifest(output).items() if name in names}
    content = describe(setup, position) | {"seconds": round(cost.seconds, 3), "energy_joules": cost.energy_joules}
    content |= {"files": files, "samples": samples, "spectrum": spectrum_summary(output)}
    content |= kept_summary(setup.recipe, output)
    manifest = run_manifest(content, setup.processes.device, setup.processes.world_size)
    write_json(output / MANIFEST, manifest)
    remove(output / SUSPECT)  # of an earlier attempt that failed
    write_text(output / MODEL_CARD, model_card(manifest, setup.recipe_text, loading_of(setup.base)))
    _write_report(output, manifest, setup.recipe_text)
    return manifest


def write_running_report(setup: RunSetup, steps: int) -> None:
    """report.html of a run in progress, of `steps` steps in all; a write error is ignored: training goes on."""
    content = describe(setup, Position()) | {"result": {}, "running": {"steps": steps}}
    manifest = run_manifest(content, setup.processes.device, setup.processes.world_size)
    with suppress(QloraError):
        _write_report(Path(setup.recipe.train.output), manifest, setup.recipe_text)


def _write_report(output: Path, manifest: Mapping[str, Any], recipe_text: str) -> None:
    run = RunData(output.name, manifest, read_metrics(output), recipe_text, manifest.get("samples", ()))
    write_text(output / PAGE, report_page([run]))


def spectrum_summary(folder: Path) -> dict[str, dict[str, float]]:
    """Rank, rank at 90 % of the energy, stable rank and norm of each update, by module path, as in `qlora inspect`.

    The experts of a stack have one entry, their mean. Empty without an adapter.
    """
    if not (folder / peft_files.WEIGHTS).is_file():
        return {}
    return {
        path: {
            "rank": values.rank,
            "energy_90_rank": values.energy_rank(0.90),
            "stable_rank": round(values.stable_rank, 3),
            "norm": float(f"{values.norm:.4g}"),
        }
        for path, values in update_spectra(peft_files.read(folder)).items()
    }


def samples_or_note(setup: RunSetup, log: Log) -> list[dict[str, str]]:
    """`generate_samples`, but without memory for them none and a line in the log: they must not cost the run."""
    try:
        return generate_samples(setup)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    log.print("no samples in the report: generating them ran out of memory. The adapter is not affected.")
    return []


def generate_samples(setup: RunSetup) -> list[dict[str, str]]:
    """Greedy answers to a few held-out examples, by the base model and by the trained one, with the reference."""
    examples = chosen_answers(setup.data.eval)
    with_prompt = [example for example in examples if (example.labels[:2] == IGNORED).all()]  # no plain text
    examples = with_prompt[:SAMPLES]
    questions = [question(example, setup.base.tokenizer) for example in examples]
    if not questions:
        return []
    prompts = [item.prompt_ids for item in questions]
    after = generate(setup.base, prompts, SAMPLE_TOKENS)
    before: list[list[int]] = [[] for _ in prompts]  # a fully trained model has no base left to answer
    if not isinstance(setup.adapter, Full):
        with disable_adapters(setup.base.model):
            before = generate(setup.base, prompts, SAMPLE_TOKENS)
    texts = [[text_of(ids, setup.base.tokenizer) for ids in column] for column in (prompts, before, after)]
    rows = zip(questions, *texts, strict=True)
    return [{"prompt": p, "reference": q.reference, "before": b, "after": a} for q, p, b, a in rows]


def write_trained(setup: RunSetup, folder: Path, final: bool = True) -> None:
    """Write the trained weights: an adapter in PEFT's format, or the model; in a checkpoint its float32 masters."""
    if isinstance(setup.adapter, Full):
        return full_model.write(folder, setup.base, setup.base.dtype if final else torch.float32)
    manifest = setup.base.manifest
    identity = peft_files.BaseIdentity(manifest.name, manifest.revision, manifest.sha256)
    return peft_files.write(folder, setup.base.model, setup.adapter, identity)


def restore_trained(setup: RunSetup, folder: Path) -> None:
    """Load the trained weights of a checkpoint."""
    if isinstance(setup.adapter, Full):
        return full_model.fill(folder, setup.base.model)
    return restore_adapter(folder, setup.base.model)


def describe(setup: RunSetup, position: Position) -> dict[str, Any]:
    """The sections of run.json that come from the run: base, adapter, data, result, memory."""
    report, injection = setup.data.report, setup.injection
    overflow_map = {} if setup.overflow_map is None else {"float16": asdict(setup.overflow_map)}
    experts = {"experts": setup.expert_loads.as_json()} if setup.expert_loads.before else {}
    return (
        overflow_map
        | experts
        | {
            "base": setup.base.manifest.as_json(),
            "adapter": {
                "kind": setup.recipe.adapter.kind,
                **asdict(setup.adapter),
                "init": setup.recipe.adapter.init or "default",
                "quantization_error": asdict(setup.init_result) if setup.init_result else None,
                "trainable_parameters": injection.trainable_parameters,
                "parameters": injection.parameters,
                "paths": list(injection.paths),
                "whole": list(injection.trained_modules),
            },
            "objective": {
                key: value for key, value in setup.recipe.objective.model_dump().items() if value is not None
            },
            "data": report.counts(),
            SECTION: setup.encoder.as_json(),
            "result": result_of(setup, position),
            "memory": {
                "planned_bytes": setup.resources.plan.peak_bytes if setup.resources.plan else None,
                "peak_bytes": peak_bytes(setup.processes.device),
                "owners": dict(setup.resources.plan.owners) if setup.resources.plan else None,
            },
        }
    )


def result_of(setup: RunSetup, position: Position) -> dict[str, Any]:
    """The losses at the start and the end, and the number of steps."""
    evaluations = [line for line in read_metrics(Path(setup.recipe.train.output)) if line.get("event") == "eval"]
    return {
        "steps": position.step,
        "loss": position.loss,
        "eval_loss": position.eval_loss,
        "eval_loss_before": evaluations[0].get("eval_loss") if evaluations else None,
        "best_eval_loss": position.best_loss,
        "best_eval_accuracy": position.best_accuracy,
        "best_step": position.best_step,
        "skipped_steps": position.skipped_steps,
        "overflow_steps": position.overflow_steps,
        "loss_scale": position.loss_scale if setup.overflow_map else None,
    }
