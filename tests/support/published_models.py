"""What the planner reads of the config.json of models that people train, and a Work of one."""

from typing import Any

from qlora.memory.planner.config_reader import shapes_of
from qlora.memory.planner.workload import AdapterSizes, Workload


def _llama(vocabulary: int, hidden: int, mlp: int, layers: int, *heads: int) -> dict[str, Any]:
    return {
        "model_type": "llama", "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": mlp,
        "num_hidden_layers": layers, "num_attention_heads": heads[0], "num_key_value_heads": heads[-1],
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip


CONFIGS: dict[str, dict[str, Any]] = {
    "Llama-2-7B": _llama(32000, 4096, 11008, 32, 32),
    "Llama-3.1-8B": _llama(128256, 4096, 14336, 32, 32, 8),
    "Llama-2-13B": _llama(32000, 5120, 13824, 40, 40),
    "Qwen3-32B": _llama(151936, 5120, 25600, 64, 64, 8) | {"model_type": "qwen3", "head_dim": 128},
    "Llama-3.1-70B": _llama(128256, 8192, 28672, 80, 64, 8),
}
BEYOND = {"Llama-3.1-405B": _llama(128256, 16384, 53248, 126, 128, 8)}  # of docs/beyond.md alone


def work_of(name: str, **options: Any) -> Workload:
    """QLoRA of rank 16 on every linear layer of a model of CONFIGS or BEYOND; options as in Work, and `rank`."""
    shapes = shapes_of((CONFIGS | BEYOND)[name], name)
    return Workload(shapes, AdapterSizes(shapes.matrices, rank=options.pop("rank", 16)), **options)
