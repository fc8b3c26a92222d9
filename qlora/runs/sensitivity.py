"""`qlora sensitivity`: what quantizing each matrix costs on the recipe's own rows, and which ones to keep in 16 bits.

The matrices stay on disk and are read one at a time. Memory: embedding and head, a few float32 copies of one matrix,
one decoder layer's activations of TOKENS tokens, and the hidden states between two layers.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qlora.data.batching.join import join_documents
from qlora.data.pairs import chosen_answers
from qlora.data.prefix_tree import paths_of
from qlora.data.prepare import Prepared, prepare
from qlora.data.types import Example
from qlora.errors import InputError
from qlora.memory.meter import peak_bytes
from qlora.model.bnb_checkpoint import is_prequantized
from qlora.model.download import find_model
from qlora.model.dtypes import choose_dtype, stored_dtype
from qlora.model.lazy_model import load_lazy_model
from qlora.model.measured_linear import MeasuredBase
from qlora.model.meta_model import read_config
from qlora.model.model_folder import ModelFolder
from qlora.model.new_tokens import add_tokens_and_resize
from qlora.model.open_checkpoint import open_checkpoint
from qlora.quant import build_quantizer, others_of
from qlora.quant.kept_choice import MatrixError, choose_kept
from qlora.recipe.dataset_profile import build_encoder
from qlora.recipe.recipe import Recipe
from qlora.runs.matrix_errors import DRAWS, measure_errors, measure_kl
from qlora.runs.memory_setup import Log
from qlora.utils.byte_sizes import share_bytes
from qlora.utils.devices import has_bfloat16, run_device
from qlora.utils.machine import gib_or_mib
from qlora.utils.progress import ProgressReporter

TOKENS = 2_048  # of the rows that errors are measured on, and of those for the KL
DOCUMENT_TOKENS = 256  # of each row: many short pieces say more than a few long ones
LISTED = 10


@dataclass(frozen=True)
class Sensitivity:
    """The error of every matrix, the choice within a budget, and the KL to the 16-bit base before and after it."""

    matrices: Sequence[MatrixError]
    kept: Sequence[str]
    kl_before: float  # nats per token, KL(16-bit base || quantized base), everything quantized
    kl_after: float
    bytes: int  # that the kept matrices add
    budget_bytes: int
    packed_bytes: int  # of the base with everything quantized
    tokens: int
    kl_tokens: int
    peak_bytes: int

    def as_json(self) -> dict[str, Any]:
        """The object of `qlora sensitivity --json`."""
        return {**asdict(self), "matrices": [asdict(matrix) for matrix in self.matrices], "kept": list(self.kept)}

    def table(self) -> str:
        """The matrices that cost most for their bytes, and the choice."""
        costly = sorted(self.matrices, key=lambda matrix: -matrix.kl / max(1, matrix.bytes))[:LISTED]
        width = max(len(matrix.name) for matrix in costly)
        lines = [f"{'matrix':{width}}  output error   KL alone  adds in 16 bits"]
        for matrix in costly:
            mark = "  kept" if matrix.name in self.kept else ""
            row = f"{matrix.name:{width}}  {matrix.error:12.2%}  {matrix.kl:.2e}  {gib_or_mib(matrix.bytes):>15}"
            lines.append(row + mark)
        unseen = sum(matrix.tokens == 0 for matrix in self.matrices)
        if len(self.matrices) > LISTED:
            lines.append(f"... and {len(self.matrices) - LISTED} more")
        if not self.kept:
            smallest = min(matrix.bytes for matrix in self.matrices)
            lines.append(
                f"the budget of {self.budget_bytes:,} bytes is below the {smallest:,} of the smallest matrix: "
                "use a larger --keep-bytes"
            )
        if unseen:
            lines.append(f"{unseen} matrices saw no token of these rows (experts): they stay quantized")
        return "\n".join([*lines, str(self)])

    def __str__(self) -> str:
        share = self.bytes / max(1, self.packed_bytes)
        return (
            f"{len(self.kept)} of {len(self.matrices)} matrices stay in 16 bits and add {gib_or_mib(self.bytes)} "
            f"({share:.1%} of the packed base); KL to the 16-bit base {self.kl_before:.2e} -> {self.kl_after:.2e} nats "
            f"per token, on {self.kl_tokens:,} tokens"
        )


def measure_sensitivity(recipe: Recipe, log: Log = lambda line: None, tokens: int = TOKENS) -> Sensitivity:
    """Measure every matrix, choose within `quant.keep_bytes`, and compare the bases before and after the choice.

    tokens: of the rows that errors and KL are measured on; fewer estimate them less exactly.

    InputError for a base that is stored in 4 bits, or a recipe that quantizes nothing; DataError; BaseModelError.
    """
    folder = find_model(recipe.model.name, recipe.model.revision)
    _refuse_unquantized(recipe, folder)
    data = _prepare(recipe)
    sequences = pick_sequences(data.train, tokens)
    base = _open(recipe, folder)
    progress = ProgressReporter(log, "measuring the matrices", "passes")
    measure_errors(base, sequences, recipe.train.seed, progress)
    matrices = _matrix_errors(base)
    packed = sum(base.quantizer.stored_bytes(*_size(base, name)) for name in base.sums)
    budget = share_bytes(recipe.quant.keep_bytes, packed)
    kept = choose_kept(matrices, budget)
    others = pick_sequences(data.eval or data.train, tokens, shift=0.5)
    before, after = measure_kl(base, others, [frozenset(), frozenset(kept)])
    chosen = {*kept}
    return Sensitivity(
        matrices,
        kept,
        before,
        after,
        sum(matrix.bytes for matrix in matrices if matrix.name in chosen),
        budget,
        packed,
        sum(map(len, sequences)),
        sum(map(len, others)),
        peak_bytes(run_device()),
    )


def _refuse_unquantized(recipe: Recipe, folder: ModelFolder) -> None:
    if recipe.quant.kind == "dense":
        raise InputError("quant.kind: dense quantizes nothing, so there is no error to measure. Use nf4 or fp4.")
    reader = open_checkpoint(folder.path)
    if any(is_prequantized(key, reader) for key in reader):
        raise InputError(
            f"{recipe.model.name} is stored in 4 bits: its 16-bit weights are not there to compare with. Use the "
            "16-bit checkpoint."
        )


def _prepare(recipe: Recipe) -> Prepared:
    section = recipe.data.model_copy(update={"packing": False})
    sided_format = recipe.objective.sided_format
    data = prepare(section, build_encoder(recipe), recipe.train.seed, shares_prefixes=False, sided_format=sided_format)
    data.report.raise_for_problems()
    return data


def pick_sequences(examples: Sequence[Example], tokens: int, shift: float = 0.0) -> list[Example]:
    """One packed sequence of the first DOCUMENT_TOKENS of examples spread evenly, up to `tokens` in all."""
    examples = chosen_answers(examples)
    count = min(len(examples), max(1, tokens // 16))
    documents: list[Example] = []
    numbers = ((np.arange(count) + shift) * len(examples) / count).astype(int) % len(examples)
    for example in _spread(dict.fromkeys(numbers.tolist())):
        for path in paths_of(examples[example]):
            document = Example(path.where, path.input_ids[:DOCUMENT_TOKENS], path.labels[:DOCUMENT_TOKENS])
            if documents and sum(map(len, documents)) + len(document) > tokens:
                return [join_documents(documents)]
            documents.append(document)
    return [join_documents(documents)]


def _spread(numbers: Iterable[int]) -> list[int]:
    """The numbers in an order whose every beginning is spread evenly: by the reversed bits of their position."""
    ordered = sorted(numbers)
    width = max(1, (len(ordered) - 1).bit_length())
    positions = sorted(range(len(ordered)), key=lambda position: int(f"{position:0{width}b}"[::-1], 2))
    return [ordered[position] for position in positions]


def _open(recipe: Recipe, folder: ModelFolder) -> MeasuredBase:
    """The base with its matrices on disk. On a CPU products are in float32, the fastest there."""
    device, config = run_device(), read_config(folder.path)
    stored = config.get_text_config().dtype or config.dtype
    dtype = stored_dtype(choose_dtype(recipe.model.dtype, stored, has_bfloat16(device)))
    compute = dtype if device.type == "cuda" else stored_dtype(choose_dtype("float32", None, bfloat16=True))
    model: Any = load_lazy_model(folder.path, compute, recipe.model.attention, device)
    if recipe.adapter.new_tokens:
        add_tokens_and_resize(model, build_encoder(recipe).tokenizer, recipe.adapter.new_tokens)
    return MeasuredBase.of(model.eval(), others_of(build_quantizer(recipe.quant)), dtype)


def _size(base: MeasuredBase, name: str) -> tuple[int, int, int]:
    layer: Any = base.model.get_submodule(name)
    return layer.out_features, layer.in_features, base.dtype.itemsize


def _matrix_errors(base: MeasuredBase) -> list[MatrixError]:
    matrices = []
    total = sum(base.measured_tokens)
    for name, sums in base.sums.items():
        out_features, in_features, itemsize = _size(base, name)
        added = out_features * in_features * itemsize - base.quantizer.stored_bytes(out_features, in_features, itemsize)
        error = (sums.error / sums.output) ** 0.5 if sums.output else 0.0
        matrices.append(MatrixError(name, added, error, sums.loss / 2 / max(1, total), sums.tokens // DRAWS))
    return matrices
