"""The frozen base model: download, loading into quantized layers, attention, LM head, fingerprint."""

from os.path import expanduser
from typing import Annotated, Literal

from qlora.config import REQUIRED, Section, Validator, setting


class Model(Section):
    """The base model."""

    name: Annotated[str, Validator(expanduser)] = setting(
        REQUIRED, "hub name or folder", min_length=1, examples=["meta-llama/Llama-3.1-8B"]
    )
    revision: str | None = setting(None, "commit, tag or branch on the hub; null: the latest", min_length=1)
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = setting(
        "auto",
        "compute dtype; auto: bfloat16 for a 16-bit base, float16 with loss scaling where the GPU has no bfloat16",
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"] = setting(
        "auto", "attention kernel; auto: SDPA within documents, eager where the model has no SDPA"
    )
    chat_template: Annotated[str, Validator(expanduser)] = setting(
        "auto", "auto: the tokenizer's; the name of one of its templates; or a Jinja file", min_length=1
    )
