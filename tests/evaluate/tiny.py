"""Tiny real models and tokenizers: random weights, so that a test needs no download and takes no time."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = (
    "the",
    "river",
    "stone",
    "walks",
    "near",
    "old",
    "lamp",
    "green",
    "and",
    "quiet",
    "boat",
    "under",
    "seven",
    "hills",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system turns') }}"
    "{% endif %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


def make_text(rows: int, seed: int = 0) -> list[str]:
    """Rows of words drawn at random; every third row is empty, as in wikitext."""
    random = torch.Generator().manual_seed(seed)
    out = []
    for row in range(rows):
        picks = torch.randint(len(WORDS), (12,), generator=random).tolist()
        out.append("" if row % 3 == 2 else " ".join(WORDS[i] for i in picks) + ".\n")
    return out


def make_tokenizer(*, bos: bool = True, template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens; puts BOS in front exactly when it has one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = (["<s>"] if bos else []) + ["</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(make_text(60, seed=99), trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>" if bos else None, eos_token="</s>", pad_token="</s>"
    )
    fast.chat_template = template
    return fast


def make_model(*, seed: int = 0, context: int = 1024, vocabulary: int = 300, noise: float = 0.0) -> LlamaForCausalLM:
    """A two-layer Llama with random float32 weights; `noise` moves them a little, as quantization would."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config).eval()
    if noise:
        random = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in model.parameters():
                weight += noise * weight.std() * torch.randn(weight.shape, generator=random)
    return model


def save_folder(
    folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """A plain model folder on disk."""
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
