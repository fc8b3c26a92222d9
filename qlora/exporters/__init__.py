"""Out of the house: what was trained, in the forms that other programs load, each checked against the trained model."""

from qlora.utils.registry import Registry

TARGETS = Registry(
    "export --to",
    merged="qlora.exporters.merged:MergedExporter",  # one model: base + update, summed in float32, rounded once
    adapter="qlora.exporters.adapter:AdapterExporter",  # PEFT's folder
    portable="qlora.exporters.portable:PortableExporter",  # a PEFT folder for readers without rsLoRA and patterns
    ollama="qlora.exporters.ollama:OllamaExporter",  # a portable adapter and its Modelfile
)
