"""Sizes of modules to save: modules that train in full next to low-rank updates, by their names in a recipe."""

from collections.abc import Iterable

from qlora.memory.planner.shapes import Shapes

EMBEDDINGS, HEADS = ("embed_tokens", "embed_in"), ("lm_head",)
LAST_NORMS, HEAD_NORMS = ("norm", "final_layer_norm"), ("q_norm", "k_norm")


def full_module_values(shapes: Shapes, names: Iterable[str]) -> dict[str, int]:
    """Path -> values of each module that matches `names` (paths or ends of paths); a tied matrix counts once.

    Names that match no module are refused when the model is loaded, not here.
    """
    known = _known(shapes)
    chosen = {path for path in known for name in names if path == name or path.endswith(f".{name}")}
    if shapes.tied and any(path.rpartition(".")[2] in EMBEDDINGS + HEADS for path in chosen):
        chosen = {path for path in chosen if path.rpartition(".")[2] not in HEADS} | {_embedding(shapes)}
    return {path: known[path] for path in known if path in chosen}


def head_trains(shapes: Shapes, paths: Iterable[str]) -> bool:
    """Whether the LM head is among the modules that train in full."""
    names = HEADS + (EMBEDDINGS if shapes.tied else ())
    return any(path.rpartition(".")[2] in names for path in paths)


def _known(shapes: Shapes) -> dict[str, int]:
    """Path -> values of every module that can train in full."""
    layer_norm = shapes.family.layer_norm
    wide = shapes.hidden * (2 if layer_norm else 1)
    inside = dict.fromkeys(shapes.family.wide_norms, wide)
    if any(shapes.query_key_norms):
        norms = zip(HEAD_NORMS, shapes.query_key_norms, strict=True)
        inside |= {f"{shapes.family.attention}.{name}": values for name, values in norms}
    inside |= {matrix.path: matrix.weights + (matrix.out_features if matrix.bias else 0) for matrix in shapes.block}
    root = shapes.layers_path.rpartition(".")[0]
    known = {_embedding(shapes): shapes.embedding}
    for layer in range(shapes.layers):
        known |= {f"{shapes.layers_path}.{layer}.{path}": values for path, values in inside.items()}
    known[f"{root}.{LAST_NORMS[layer_norm]}"] = wide
    return known | {HEADS[0]: shapes.embedding}


def _embedding(shapes: Shapes) -> str:
    return f"{shapes.layers_path.rpartition('.')[0]}.{EMBEDDINGS[shapes.family.layer_norm]}"
