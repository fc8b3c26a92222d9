"""Export target `gguf`: base plus update as one file that llama.cpp and Ollama run, tensor by tensor."""

import tempfile
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora.errors import InputError
from qlora.exporters.export_source import ExportOptions, ExportSource
from qlora.exporters.gguf import DEFAULT_STORAGE, MODEL_FILE
from qlora.exporters.gguf.gguf_architectures import Architecture, architecture_of
from qlora.exporters.gguf.gguf_file import PlannedGguf, Value, file_type, storage_for, write_gguf
from qlora.exporters.gguf.metadata import ROPE_FREQS, architecture_metadata, rope_divisors
from qlora.exporters.gguf.planned_reader import PlannedReader
from qlora.exporters.gguf.tensor_layout import Placement, placements
from qlora.exporters.gguf.vocabulary import STOP_ROLES, build_vocabulary
from qlora.exporters.merged import plan_merged
from qlora.model.checkpoint_reader import CheckpointReader
from qlora.model.layouts.checkpoint_layout import CheckpointLayout, read_layout
from qlora.model.meta_model import build_meta_model, read_tokenizer

PRECISE = {"q4_0": "q8_0"}  # how embedding and head are stored beside matrices of this storage
ENDS = ("token_embd.weight", "output.weight")
ROUTER = ".ffn_gate_inp."  # small, and read as float32
STRIPPING_NAMES = {"phi-3": "phi 3", "phi3": "phi 3"}  # in general.name: llama.cpp drops blanks after control tokens
STRIPPING_TOKENS = {"<unk>", "<s>", "</s>", "<|endoftext|>"}  # ... and ends without one of these


class GgufExporter:
    """Writes one file, MODEL_FILE."""

    def write(self, source: ExportSource, folder: Path, options: ExportOptions) -> int:
        """Write the file; returns the bytes of its tensors.

        InputError for a model or a tokenizer that llama.cpp has no form for, before a tensor is computed.
        """
        architecture = architecture_of(source.model)
        tensors = plan_merged(source, options)
        reader = PlannedReader(source.base_folder, tensors)
        skeleton = _skeleton(source, set(reader))
        layout = read_layout(skeleton, reader)
        planned = plan_tensors(architecture, skeleton, layout, reader, options.storage or DEFAULT_STORAGE)
        metadata = _metadata(architecture, source, skeleton.config.get_text_config(), options)
        return write_gguf(folder / MODEL_FILE, architecture.name, metadata, planned, options.report)


def _skeleton(source: ExportSource, keys: set[str]) -> Any:
    """The model on `meta`; its head is its own tensor if training made it differ from the embedding."""
    config: Any = deepcopy(source.model.config)
    cpu = torch.device("cpu")
    skeleton: Any = build_meta_model(config, source.compute_dtype, "auto", cpu)
    tied: dict[str, str] = dict(skeleton.all_tied_weights_keys)
    if any(head in keys and embedding in keys for head, embedding in tied.items()):
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = False
        skeleton = build_meta_model(config, source.compute_dtype, "auto", cpu)
    return skeleton


def plan_tensors(
    architecture: Architecture, skeleton: Any, layout: CheckpointLayout, reader: CheckpointReader, storage: str
) -> list[PlannedGguf]:
    """Every tensor of the file of a model, whose values are those of `reader`. skeleton: the model on `meta`."""
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.named_parameters(remove_duplicate=False)}
    tied: dict[str, str] = dict(skeleton.all_tied_weights_keys)

    def read(name: str) -> Tensor:
        return layout.sources[tied.get(name, name)].read(reader)

    divisors = rope_divisors(skeleton.config.get_text_config())
    extra = [] if divisors is None else [PlannedGguf(ROPE_FREQS, tuple(divisors.shape), "float32", lambda: divisors)]
    planned = [
        _planned(place, shapes, storage, partial(place.make, read)) for place in placements(architecture, skeleton)
    ]
    return [*extra, *planned]


def _planned(
    place: Placement, shapes: dict[str, tuple[int, ...]], storage: str, make: Callable[[], Tensor]
) -> PlannedGguf:
    rows, *others = shapes[place.sources[0]]
    shape = (rows if place.half is None else rows // 2, *others)
    if place.is_stack:
        shape = (len(place.sources), *shape)
    if len(shape) == 1 or ROUTER in place.name or place.name.endswith(".bias"):
        return PlannedGguf(place.name, shape, "float32", make)
    chosen = PRECISE.get(storage, storage) if place.name in ENDS else storage
    return PlannedGguf(place.name, shape, storage_for(shape, chosen), make)


def _metadata(
    architecture: Architecture, source: ExportSource, config: Any, options: ExportOptions
) -> dict[str, Value]:
    storage = options.storage or DEFAULT_STORAGE
    with tempfile.TemporaryDirectory() as temporary:
        source.write_tokenizer(Path(temporary))
        tokenizer = read_tokenizer(Path(temporary))
        vocabulary = build_vocabulary(tokenizer, config.vocab_size, source.stop_token_ids, source.chat_template)
        strips = any(token.rstrip for token in tokenizer.added_tokens_decoder.values())
    if len(source.stop_token_ids) > len(STOP_ROLES):
        count = f"{len(source.stop_token_ids)} tokens end an answer, a GGUF file names {len(STOP_ROLES)}"
        options.lines.append(f"careful: {count}: name the others as stop texts in the requests")
    name = general_name(options.model_name or "model", strips, vocabulary.tokens)
    general: dict[str, Value] = {"general.type": "model", "general.name": name, "general.file_type": file_type(storage)}
    if storage.startswith("q"):
        general["general.quantization_version"] = 2
    return {**general, **architecture_metadata(architecture, config), **vocabulary.metadata}


def general_name(base: str, strips_blanks: bool, tokens: Sequence[str]) -> str:
    """The base's name, in a form by which llama.cpp drops blanks after control tokens just as the tokenizer does."""
    name = Path(base).name
    lowered = name.lower()
    if not strips_blanks:
        for stripping, plain in STRIPPING_NAMES.items():
            name = name if stripping not in lowered else plain.join(_split(name, stripping))
            lowered = name.lower()
        return name
    if not set(tokens) >= STRIPPING_TOKENS:
        raise InputError(
            "--to gguf: this tokenizer drops blanks after control tokens, which llama.cpp does for Phi-3's only. "
            "Use --to merged."
        )
    return name if any(stripping in lowered for stripping in STRIPPING_NAMES) else f"{name} (Phi-3)"


def _split(name: str, part: str) -> list[str]:
    """The texts between occurrences of `part`, in any case."""
    lowered, parts, start = name.lower(), [], 0
    while (at := lowered.find(part, start)) >= 0:
        parts.append(name[start:at])
        start = at + len(part)
    return [*parts, name[start:]]
