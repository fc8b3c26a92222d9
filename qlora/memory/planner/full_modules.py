"""Sizes of modules to save: modules that train in full next to low-rank updates, by their names in a recipe."""

from collections.abc import Iterable

from qlora.memory.planner.shapes import Layer, Shapes

HEAD = "lm_head"
HEAD_NORMS = ("q_norm", "k_norm")


def full_module_values(shapes: Shapes, names: Iterable[str]) -> dict[str, int]:
    """Path -> values of each module that matches `names` (paths or ends of paths); a tied matrix counts once.

    Names that match no module are refused when the model is loaded, not here.
    """
    known = _known(shapes)
    chosen = {path for path in known for name in names if path == name or path.endswith(f".{name}")}
    if shapes.tied and any(path.rpartition(".")[2] in (shapes.flags.embedding, HEAD) for path in chosen):
        chosen = {path for path in chosen if path.rpartition(".")[2] != HEAD} | {_embedding(shapes)}
    return {path: known[path] for path in known if path in chosen}


def head_trains(shapes: Shapes, paths: Iterable[str]) -> bool:
    """Whether the LM head is among the modules that train in full."""
    names = (HEAD, shapes.flags.embedding) if shapes.tied else (HEAD,)
    return any(path.rpartition(".")[2] in names for path in paths)


def _known(shapes: Shapes) -> dict[str, int]:
    """Path -> values of every module that can train in full."""
    root = shapes.layers_path.rpartition(".")[0]
    inside = [_inside(shapes, layer) for layer in shapes.kinds]
    known = {_embedding(shapes): shapes.embedding}
    for layer, kind in enumerate(shapes.order):
        known |= {f"{shapes.layers_path}.{layer}.{path}": values for path, values in inside[kind].items()}
    known[f"{root}.{shapes.flags.last_norm}"] = shapes.last_norm
    return known | {HEAD: shapes.embedding}


def _inside(shapes: Shapes, layer: Layer) -> dict[str, int]:
    """Path within a layer -> values of its norms and plain matrices; experts can't train in full."""
    values = dict.fromkeys(layer.wide_norms, shapes.last_norm)
    if layer.attention and any(layer.attention.norms):
        norms = zip(HEAD_NORMS, layer.attention.norms, strict=True)
        values |= {f"{shapes.flags.attention}.{name}": size for name, size in norms}
    plain = (matrix for matrix in layer.matrices if not matrix.experts)
    return values | {matrix.path: matrix.weights + (matrix.out_features if matrix.bias else 0) for matrix in plain}


def _embedding(shapes: Shapes) -> str:
    return f"{shapes.layers_path.rpartition('.')[0]}.{shapes.flags.embedding}"
