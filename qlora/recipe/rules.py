"""Rules across sections of a recipe: which settings exclude each other, or leave another without effect."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qlora.adapters import Adapter
from qlora.data import SIDED_FORMATS, Data
from qlora.memory import Memory
from qlora.model import Model
from qlora.quant import Quant
from qlora.training import Optim, Train
from qlora.training.objectives import READ_BY, Objective


def conflicts_between(sections: Mapping[str, Any]) -> dict[str, str]:
    """`key: message` of every conflict. A rule is checked if all its sections are present."""
    conflicts: dict[str, str] = {}
    for names, rule in RULES:
        if sections.keys() >= set(names):
            conflicts |= rule(*(sections[name] for name in names))
    return conflicts


def _full_needs_dense(adapter: Adapter, quant: Quant) -> dict[str, str]:
    if adapter.kind != "full" or quant.kind == "dense":
        return {}
    message = f"full trains every weight, and {quant.kind} weights can't be trained. Set quant.kind: dense."
    return {"adapter.kind": message}


def _loftq_needs_quantization(adapter: Adapter, quant: Quant) -> dict[str, str]:
    if adapter.kind == "full" or adapter.init != "loftq" or quant.kind != "dense":
        return {}
    return {"adapter.init": "loftq starts from the quantization error, and quant.kind dense has none. Remove it."}


def _loraplus_needs_lora(adapter: Adapter, optim: Optim) -> dict[str, str]:
    if adapter.kind != "full" or optim.loraplus_ratio is None:
        return {}
    return {"optim.loraplus_ratio": "has no effect: adapter.kind full has no A and B. Remove it."}


def _full_is_resident(adapter: Adapter, memory: Memory) -> dict[str, str]:
    if adapter.kind != "full" or memory.weights != "stream":
        return {}
    return {"memory.weights": "stream: only frozen weights stream; adapter.kind full trains all. Remove it."}


def _embedding_is_resident(adapter: Adapter, memory: Memory) -> dict[str, str]:
    key = next((key for key in ("save_modules", "tokens", "new_tokens") if getattr(adapter, key)), None)
    if key is None or memory.weights != "stream":
        return {}
    return {"memory.weights": f"stream: only frozen weights stream; adapter.{key} trains some. Remove one of the two."}


def _evaluation_needs_data(train: Train, data: Data) -> dict[str, str]:
    if data.eval is not None or data.eval_fraction > 0:
        return {}
    keys = [key for key in ("eval_every", "early_stop", "sample_prompts") if getattr(train, key) not in (None, ())]
    reason = "there is no evaluation data (data.eval null, data.eval_fraction 0)"
    return {f"train.{key}": f"has no effect: {reason}. Remove it, or set one of them." for key in keys}


def _early_stop_needs_evaluations(train: Train) -> dict[str, str]:
    if train.early_stop is None or train.eval_every is not None:
        return {}
    return {"train.early_stop": "has no effect: there are no evaluations during training. Set train.eval_every too."}


def _accuracy_is_of_pairs(objective: Objective, train: Train) -> dict[str, str]:
    if train.early_stop_on != "accuracy" or objective.sided_format == "preference":
        return {}
    message = f"accuracy: objective.kind {objective.kind} compares no pairs, so it has none. Use loss."
    return {"train.early_stop_on": message}


def _compiled_is_resident(train: Train, memory: Memory) -> dict[str, str]:
    """A compiled layer is one graph: no copy can be placed inside it."""
    settings = {"memory.weights": memory.weights == "stream", "memory.offload_activations": memory.offload_activations}
    reason = "compiled layers neither stream nor offload. Remove it, or train.compile."
    return {key: reason for key, value in settings.items() if train.compile and value is True}


def _full_has_no_float16(model: Model, adapter: Adapter) -> dict[str, str]:
    if adapter.kind != "full" or model.dtype != "float16":
        return {}
    message = "is for the products of frozen matrices, and adapter.kind full has none. Use auto, bfloat16 or float32."
    return {"model.dtype": f"float16 {message}"}


def _sides_need_their_format(objective: Objective, data: Data) -> dict[str, str]:
    """Records are read as what the objective compares, and as nothing else."""
    needed, sources = objective.sided_format, (*data.train, *(data.eval or ()))
    formats = {format for format in (data.format, *(source.format for source in sources)) if format} - {"auto"}
    if needed is None:
        wrong = sorted(formats & {*SIDED_FORMATS})
        kinds = "kto" if wrong == ["feedback"] else "dpo, ipo, orpo or simpo"
        reason = f"has no effect under objective.kind sft, which compares no answers. Set objective.kind: {kinds}."
    else:
        wrong = sorted(formats - {needed})
        reason = f"objective.kind {objective.kind} reads records of the format {needed}. Set it, or remove data.format."
    return {"data.format": f"{wrong[0]}: {reason}"} if wrong else {}


def _sides_are_whole(objective: Objective, data: Data) -> dict[str, str]:
    if objective.sided_format is None:
        return {}
    conflicts = {}
    if data.overlong in ("truncate", "split"):
        message = (
            f"{data.overlong}: a preference for a whole answer says nothing about a part of it. Use drop or error."
        )
        conflicts["data.overlong"] = message
    if data.train_on == "all":
        message = f"all: objective.kind {objective.kind} compares answers, and a prompt is none. Use assistant or last."
        conflicts["data.train_on"] = message
    return conflicts


def _reference_does_not_train(objective: Objective, adapter: Adapter) -> dict[str, str]:
    if objective.kind not in READ_BY["reference"]:
        return {}
    if adapter.kind == "full":
        message = f"{objective.kind} needs the frozen base as its reference, and adapter.kind full trains it. "
        return {"objective.kind": message + "Use lora, or an objective without a reference: orpo or simpo."}
    trained = adapter.trains_base_weights()
    if trained and objective.reference != "base":
        return {
            trained: "training starts at objective.reference, an adapter of low-rank updates. Remove one of the two."
        }
    return {}


def _reference_is_no_output(objective: Objective, train: Train) -> dict[str, str]:
    if objective.kind not in READ_BY["reference"] or objective.reference == "base":
        return {}
    reference, output = (Path(name).expanduser().resolve() for name in (objective.reference, train.output))
    if reference != output and output not in reference.parents:
        return {}
    return {
        "objective.reference": f"{objective.reference} is in this run's own output folder. Set another train.output."
    }


RULES: tuple[tuple[tuple[str, ...], Callable[..., dict[str, str]]], ...] = (
    (("adapter", "quant"), _full_needs_dense),
    (("model", "adapter"), _full_has_no_float16),
    (("adapter", "quant"), _loftq_needs_quantization),
    (("adapter", "optim"), _loraplus_needs_lora),
    (("adapter", "memory"), _full_is_resident),
    (("adapter", "memory"), _embedding_is_resident),
    (("train",), _early_stop_needs_evaluations),
    (("train", "data"), _evaluation_needs_data),
    (("objective", "train"), _accuracy_is_of_pairs),
    (("train", "memory"), _compiled_is_resident),
    (("objective", "data"), _sides_need_their_format),
    (("objective", "data"), _sides_are_whole),
    (("objective", "adapter"), _reference_does_not_train),
    (("objective", "train"), _reference_is_no_output),
)
