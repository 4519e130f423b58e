"""Small language models with random weights, in Hugging Face layout, of the families that are tested."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    Olmo2Config,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

VOCAB = 320
D_MODEL = 64
N_LAYERS = 4
BOS, EOS, PAD = 0, 1, 2
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}w{{ loop.index }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}w9{% endif %}"
)

_SHARED = {
    "vocab_size": VOCAB,
    "hidden_size": D_MODEL,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    # Large weights, so that random models have sharp opinions which steering must visibly move.
    "initializer_range": 0.2,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_SHARED),
    "gemma2": Gemma2Config(**_SHARED, query_pre_attn_scalar=32, sliding_window=128),
    "qwen3": Qwen3Config(**_SHARED),
    # vLLM runs this one through Transformers.
    "olmo2": Olmo2Config(**_SHARED),
    "gpt2": GPT2Config(
        vocab_size=VOCAB,
        n_embd=D_MODEL,
        n_layer=N_LAYERS,
        n_head=2,
        n_inner=96,
        n_positions=512,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        initializer_range=0.2,
    ),
}


def make_model(folder: Path, family: str, seed: int = 0, *, never_special: bool = False) -> Path:
    """Save a model of `family` with its tokenizer to `folder`; returns the folder.

    Args: never_special: it never emits BOS, EOS or PAD, however it is sampled, so that every reply has the
        length that was asked for and every one of its tokens is steered. Needs untied embeddings.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]).float().eval()
    if never_special:
        with torch.no_grad():
            # Their logits are zero; the best of the others is then far above, at any temperature near 1.
            model.lm_head.weight.mul_(20)
            model.lm_head.weight[[BOS, EOS, PAD]] = 0
    model.generation_config.eos_token_id = EOS
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words w3 … w319 are the tokens 3 … 319; BOS is put in front."""
    vocab = {"<bos>": BOS, "<eos>": EOS, "<pad>": PAD} | {f"w{i}": i for i in range(3, VOCAB)}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
    )
