"""Out of the house: what was trained, in the forms that other programs load, each checked against the trained model."""

from qlora.utils.registry import Kinds

TARGETS = Kinds(
    "export --to",
    merged="qlora.exporters.merged:Merged",  # one model: base + update, summed in float32, rounded once
    adapter="qlora.exporters.adapter:Adapter",  # PEFT's folder
    portable="qlora.exporters.portable:Portable",  # a PEFT folder that readers without rsLoRA and patterns take as well
    ollama="qlora.exporters.ollama:Ollama",  # a portable adapter and its Modelfile
)
