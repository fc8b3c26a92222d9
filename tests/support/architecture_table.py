"""What every class of AutoModelForCausalLM does here: trains packed, trains unpacked, is refused, is not built."""


def names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PACKED = names("""
    apertus apertus1p5_text arcee bert bert-generation biogpt bitnet codegen cohere cohere2 ctrl cwm diffllama
    dory electra ernie ernie4_5 exaone exaone4 falcon fuyu gemma gemma2 gemma3 gemma3_text gemma3n_text gemma4
    gemma4_text gemma4_unified gemma4_unified_text git glm glm4 got_ocr2 gpt_bigcode gpt_neo gpt_neox
    gpt_neox_japanese gptj granite granite_swa helium hrm_text hunyuan_v1_dense hyperclovax internlm3 iquestcoder jais2
    llama minicpm3 ministral ministral3 mistral modernbert-decoder moshi moss_transcribe_diarize nanochat
    nemotron olmo olmo2 olmo3 opt persimmon phi phi3 qwen2 qwen3 seed_oss smollm3 stablelm starcoder2 vaultgemma
    whisper youtu cohere_compass_text
""")
RECURRENT = names("""
    bamba falcon_h1 falcon_mamba granitemoehybrid jamba lfm2 lfm2_moe lfm3 mamba mamba2 nemotron_h olmo_hybrid
    qwen3_5 qwen3_5_text qwen3_next recurrent_gemma xlstm zamba zamba2
""")  # packed: each document runs alone through their recurrent mixers
PACKED += RECURRENT
UNPACKED = names("""
    bart big_bird bigbird_pegasus blenderbot blenderbot-small bloom marian mbart megatron-bert mpt mvp pegasus
    plbart rembert roformer trocr xglm
""")
WITH_EXPERTS = names("""
    aria_text bailing_hybrid beam cohere2_moe doge exaone_moe flex_olmo flint granitemoe_swa granitemoeshared
    hunyuan_v1_moe hy_v3 inkling_text jetmoe kimi_linear kolibri1 laguna lara_mini llama4 mimo_v2_flash
    minimax_m3_vl_text sarvam_moe solar_open
""")  # beside those of expert_families.py
EXPERTS_NOT_BUILT = {  # neither a small model nor a refusal
    **dict.fromkeys(("axk1", "deepseek_v32", "glm_moe_dsa", "hy_v4", "inkling2_loop_text", "inkling2_text"), "large"),
    **dict.fromkeys(("longcat_flash", "qwen3_5_moe", "qwen4_exp", "qwen4_exp_text"), "large"),
    **dict.fromkeys(("axk2", "sarvam_mla", "zaya", "dbrx"), "the sizes contradict each other"),
    "deepseek_v4": "its checkpoint is another layout than its class reads",
    "minimax": "its attention is not causal, and it is refused",
    **dict.fromkeys(("musicgen", "musicgen_melody"), "no text model"),
}
NO_LINEAR, NOT_CAUSAL = "no linear layer to adapt", "its attention is not causal"
LAYER, AUTO = "layer 1 of 2 differs from transformers' class", "for this kind of AutoModel"
REFUSED = {
    **dict.fromkeys(("gpt2", "gpt-sw3", "openai-gpt"), NO_LINEAR),
    **dict.fromkeys(("camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xmod"), LAYER),
    **dict.fromkeys(("xlm-roberta", "xlm-roberta-xl"), LAYER),
    **dict.fromkeys(("cpmant", "xlm"), NOT_CAUSAL),
    "xlnet": f"{NOT_CAUSAL}|its logits differ",
    **dict.fromkeys(("emu3", "mllama"), AUTO),
    "gemma4_unified_assistant": "does not run with frozen layers",
    "prophetnet": "its logits differ from those of transformers' class",
    "reformer": "does not run in training mode",
    "roc_bert": "does not run with frozen layers",
    "rwkv": "does not run with frozen layers",
}
NOT_BUILT = {  # neither a small model nor a refusal by config.json
    **dict.fromkeys(("blt", "phi4_multimodal"), "more than 10 million parameters"),
    **dict.fromkeys(("dots1", "dots3_note", "dots3_note_text", "gemma4_assistant"), "the sizes contradict each other"),
    "gemma3n": "its vision tower needs pillow",
}
SLOW = names("""
    apertus1p5_text bert-generation bigbird_pegasus biogpt blenderbot blenderbot-small camembert cohere2 ctrl
    cwm data2vec-text electra emu3 ernie exaone gemma3 gemma4_text gemma4_unified gemma4_unified_text
    glm got_ocr2 gpt-sw3 gpt_bigcode gpt_neox_japanese granite_swa hyperclovax internlm3 iquestcoder
    jais2 jamba lfm2_moe lfm3 marian mbart megatron-bert ministral ministral3 mllama moss_transcribe_diarize mvp
    openai-gpt pegasus persimmon plbart prophetnet qwen3_5 rembert roberta-prelayernorm roc_bert roformer seed_oss trocr
    xlm xlm-roberta xlm-roberta-xl xlstm xmod zamba zamba2
""")  # near copies of other classes, and large ones
