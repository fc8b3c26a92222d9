"""The embedded base model before its training: tokenizer, shape, and an initialization that learns copying fast."""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

START, TURN, END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# GPT-2's pattern, except that every digit is a token, so that numbers can be copied.
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
VOCABULARY = 2048
HIDDEN, QUERY_HEADS, KEY_HEADS, HEAD = 192, 6, 2, 32
ROPE_THETA = 10000.0
LONGEST = 512  # tokens

EMBEDDING_SD = 0.5  # large compared with a step of Adam, so that the first steps keep the tokens apart
LAST_NORM = 0.05  # keeps the first logits near zero with large tied embeddings
CONSTANT = 8 * EMBEDDING_SD  # value of every embedding in dimension 0: input of attention by position
PHASES = 3  # rotary frequencies that encode a position; the slower ones differ too little between neighbors
SHARPNESS = 9.0  # norm of a query and of a key at each frequency


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the chat template and its control tokens."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytewise])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[START, TURN, END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[TURN],
        chat_template=TEMPLATE,
        model_max_length=LONGEST,
        clean_up_tokenization_spaces=False,
    )


def untrained_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of 1.7 million parameters; both sides of every matrix are multiples of 64. Random with torch's seed."""
    model = LlamaForCausalLM(_shape(tokenizer))
    embeddings = model.model.embed_tokens.weight.data  # [V, 192], tied to the head
    embeddings.mul_(EMBEDDING_SD / model.config.initializer_range)
    embeddings[:, 0] = CONSTANT
    model.model.norm.weight.data.mul_(LAST_NORM)
    _attend_back(model)
    return model


def _shape(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=QUERY_HEADS,
        num_key_value_heads=KEY_HEADS,
        head_dim=HEAD,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        max_position_embeddings=LONGEST,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _attend_back(model: LlamaForCausalLM) -> None:
    """Initialize the first three heads of layer 0 to attend to the token 1, 2 and 3 positions back.

    An induction head, which copies, needs a head that reads the previous token (arXiv:2209.11895). Rotary phases do
    this: keys are rotated one position ahead, queries of head n are rotated n positions back, so that their product is
    largest for the key n + 1 positions before the query.
    """
    attention = model.model.layers[0].self_attn
    _rotate(attention.k_proj.weight.data[:HEAD], 1)
    for head in range(QUERY_HEADS // KEY_HEADS):
        _rotate(attention.q_proj.weight.data[head * HEAD : (head + 1) * HEAD], -head)


def _rotate(rows: Tensor, positions: int) -> None:
    """Write into the rows [32, I] of one head a vector of fixed norm whose phases are `positions` ahead."""
    half = HEAD // 2
    frequencies = ROPE_THETA ** (-torch.arange(PHASES) / half)
    # The constant dimension after RMSNorm, if the other dimensions have EMBEDDING_SD.
    level = CONSTANT / (EMBEDDING_SD**2 + CONSTANT**2 / HIDDEN) ** 0.5
    rows.mul_(0.1)
    rows[:, 0] = 0
    rows[:PHASES, 0] = SHARPNESS / level * torch.cos(positions * frequencies)
    rows[half : half + PHASES, 0] = SHARPNESS / level * torch.sin(positions * frequencies)
