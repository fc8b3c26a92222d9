"""Out of the house: what was trained, in the forms that other programs load, each checked against the trained model."""

from qlora.kinds import Kinds

TARGETS = Kinds(
    "export --to",
    merged="qlora.export.merged:Merged",  # one model: base + delta, summed in float32, rounded once, tensor by tensor
    adapter="qlora.export.adapter:Adapter",  # PEFT's folder
    portable="qlora.export.portable:Portable",  # a PEFT folder that readers without rsLoRA and patterns take as well
    ollama="qlora.export.ollama:Ollama",  # a portable adapter and its Modelfile
)
