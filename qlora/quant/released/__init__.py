"""Formats in which quantized models are released, decoded to 16 bits: what a frozen layer is then quantized from.

A format finds its tensors by their keys, dtypes and shapes in a checkpoint, and decodes one matrix at a time. Formats
that these do not tell from each other (AWQ, GPTQ) also read `quantization_config` of config.json.
"""

from qlora.utils.registry import Registry

FORMATS = Registry(
    "released format",
    fp8="qlora.quant.released.fp8:Fp8",  # 8-bit floats, scales of blocks, channels or the tensor
    mxfp4="qlora.quant.released.mxfp4:Mxfp4",  # e2m1, a power of two for 32 weights       OCP Microscaling v1.0
    nvfp4="qlora.quant.released.nvfp4:Nvfp4",  # e2m1, an FP8 scale for 16 weights, and one for the tensor
    pack_quantized="qlora.quant.released.pack_quantized:PackQuantized",  # compressed-tensors, 1 to 8 bits in int32
    int_quantized="qlora.quant.released.int_quantized:IntQuantized",  # compressed-tensors, a byte a weight
    awq="qlora.quant.released.awq:Awq",  # 4 bits in an interleaved order             arXiv:2306.00978
    gptq="qlora.quant.released.gptq:Gptq",  # 2, 3, 4 or 8 bits                       arXiv:2210.17323
    llm_int8="qlora.quant.released.llm_int8:LlmInt8",  # bitsandbytes, a scale for each row   arXiv:2208.07339
)
