"""Sizes of the random models that the benchmarks make. Imports nothing heavy."""

from __future__ import annotations

MEDIUM = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 4000,
}
"""102.6 million parameters."""

NARROW = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4000,
}
"""3.1 million parameters per layer: small, but 24 layers more would be seen in the memory."""

WIDE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
"""Llama 3.1 8B with 2 of its 32 layers: 3 GB on disk."""
