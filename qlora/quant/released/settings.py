"""What config.json's `quantization_config` adds to the tensors of a released checkpoint."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from qlora.errors import BaseModelError

METHODS = (
    "auto-round", "awq", "bitsandbytes", "compressed-tensors", "fbgemm_fp8", "fp8", "gptq", "modelopt", "mxfp4",
)  # fmt: skip
LAYOUTS = {"awq": ("gemm", "exllama"), "gptq": ("gptq", "gptq_v2")}  # of the files; the first is the default
CT_FORMATS = (
    "dense", "float-quantized", "int-quantized", "mixed-precision", "mxfp4-pack-quantized", "mxfp8-quantized",
    "naive-quantized", "nvfp4-pack-quantized", "pack-quantized",
)  # fmt: skip
AUTO_ROUND = {"auto_round:auto_gptq": "gptq", "auto_round:auto_awq": "awq", "auto_round:llm_compressor": None}
KEYS = ("quantization_config", "compression_config")


@dataclass(frozen=True)
class QuantizationSettings:
    """The settings that decoding needs and the tensors do not show."""

    method: str | None = None  # of METHODS
    packed: str | None = None  # "awq" or "gptq": what `qweight` is
    layout: str = ""  # of LAYOUTS[packed]
    blocks: tuple[tuple[int, int], ...] = ()  # rows, columns that share a scale, as far as they are named
    bits: tuple[int, ...] = field(default=())  # of integers, as far as they are named

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> "QuantizationSettings":
        """The settings of a config.json. BaseModelError for a method or a layout that can't be decoded."""
        section = _section(config)
        method = section.get("quant_method")
        if method is not None and method not in METHODS:
            raise _unknown("quant_method", method, METHODS)
        packed = method if method in LAYOUTS else None
        if method == "auto-round":
            packing = section.get("packing_format", "auto_round:auto_gptq")
            if packing not in AUTO_ROUND:
                raise _unknown("packing_format", packing, tuple(AUTO_ROUND))
            packed = AUTO_ROUND[packing]
        if method == "compressed-tensors":
            _check_compressed_tensors(section)
        blocks, bits = tuple(_blocks(section)), tuple(dict.fromkeys(_bits(section)))
        return cls(method, packed, _layout(packed, section) if packed else "", blocks, bits)


def _section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The mapping that describes the quantization, of the model or of its text model; empty if there is none."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        for key in KEYS:
            section = part.get(key)
            if isinstance(section, Mapping):
                return section
    return {}


def _layout(packed: str, section: Mapping[str, Any]) -> str:
    """The layout of AWQ's or GPTQ's files; older files name none."""
    key = "version" if packed == "awq" and "version" in section else "checkpoint_format"
    layout = str(section.get(key, LAYOUTS[packed][0])).lower()
    if packed == "gptq" and section.get("is_marlin_format") is True:
        key, layout = "checkpoint_format", "marlin"
    if layout not in LAYOUTS[packed]:
        raise _unknown(key, layout, LAYOUTS[packed])
    return layout


def _groups(section: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The groups of layers of compressed-tensors."""
    groups = section.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        if isinstance(group, Mapping):
            yield group


def _weights(section: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The sections that describe weights: that of the whole model and, of compressed-tensors, those of its groups."""
    yield section
    for group in _groups(section):
        if isinstance(group.get("weights"), Mapping):
            yield group["weights"]


def _blocks(section: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    for weights in _weights(section):
        for key in ("weight_block_size", "block_structure"):
            block = weights.get(key)
            if isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block):
                yield block[0], block[1]


def _bits(section: Mapping[str, Any]) -> Iterator[int]:
    for weights in _weights(section):
        bits = weights.get("num_bits", weights.get("bits"))
        if isinstance(bits, int) and 1 <= bits <= 8 and weights.get("type", "int") == "int":
            yield bits


def _check_compressed_tensors(section: Mapping[str, Any]) -> None:
    """BaseModelError for a format of compressed-tensors that can't be decoded, sparsity and transforms included."""
    for part in (section, *_groups(section)):
        if part.get("format") is not None and part["format"] not in CT_FORMATS:
            raise _unknown("format", part["format"], CT_FORMATS)
    sparsity = section.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") not in (None, "dense"):
        raise _unknown("sparsity_config.format", sparsity["format"], ("dense",))
    transforms = section.get("transform_config")
    if isinstance(transforms, Mapping) and transforms.get("config_groups"):
        raise _unknown("transform_config", "transforms of the activations", ("none",))


def _unknown(key: str, value: object, allowed: tuple[str, ...]) -> BaseModelError:
    return BaseModelError(
        f"config.json: quantization_config.{key}: found {str(value)[:60]!r}, which can't be decoded; allowed: "
        f"{', '.join(allowed)}. Take the 16-bit checkpoint of this model."
    )
