"""The model that is not trained: found on disk or on the hub, streamed into frozen layers, known by its fingerprint."""

from typing import Literal

from qlora.config import REQUIRED, Section, setting


class Model(Section):
    """The base model."""

    name: str = setting(REQUIRED, "hub name or folder", min_length=1, examples=["meta-llama/Llama-3.1-8B"])
    revision: str | None = setting(None, "commit, tag or branch on the hub; null: the newest", min_length=1)
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = setting(
        "auto", "what the model computes in; auto: the base's own, bfloat16 where the device has it"
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"] = setting(
        "auto", "attention kernel; auto: what transformers picks"
    )
    chat_template: str = setting("auto", "auto: the tokenizer's own; or a Jinja file", min_length=1)
