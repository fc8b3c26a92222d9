"""The config.json of published models, as far as the planner reads it, and workloads of them under recipe defaults."""

from typing import Any

from qlora.adapters import Adapter
from qlora.data import Data
from qlora.memory.planner.config_reader import shapes_of
from qlora.memory.planner.shapes import Shapes
from qlora.memory.planner.workload import Workload
from qlora.model import Model
from qlora.quant import Quant, build_quantizer
from qlora.recipe.planning import adapter_sizes
from qlora.training import Optim, Train
from support.published_configs import NEW_CONFIGS


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
LARGE = {"Llama-3.1-405B": _llama(128256, 16384, 53248, 126, 128, 8)}  # only for docs/large-models.md
GPU: dict[str, Any] = {"device": "cuda", "dtype_bytes": 2}


def work_of(name: str, **options: Any) -> Workload:
    """The workload of a model of CONFIGS, LARGE or NEW_CONFIGS on a GPU; options as in `workload`."""
    return workload(shapes_of((CONFIGS | LARGE | NEW_CONFIGS)[name], name), **options)


def workload(shapes: Shapes, **options: Any) -> Workload:
    """Training of every linear layer under the defaults of a recipe; options: fields of Workload, and `rank`."""
    adapter, data, model, optim, train = Adapter(), Data(train="-"), Model(name="-"), Optim(), Train()
    rank = options.pop("rank", adapter.rank)
    defaults: dict[str, Any] = {
        "adapters": adapter_sizes(adapter.model_copy(update={"rank": rank}), shapes),
        "quantizer": build_quantizer(Quant()),
        "optimizer": optim.kind,
        "micro_batch": train.micro_batch,
        "max_length": data.max_length,
        "packing": data.packing,
        "attention": model.attention,
    }
    return Workload(shapes, **(GPU | defaults | options))
