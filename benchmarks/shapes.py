"""Shapes of the models that benchmarks give random weights."""

from __future__ import annotations

from transformers import LlamaConfig, PretrainedConfig, Qwen2Config

__all__ = ["SHAPES", "config_of"]

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 512,
        "max_position_embeddings": 2048,
    },
    "embedded": {  # the base model that rayrl comes with
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 384,
        "vocab_size": 400,
        "max_position_embeddings": 1024,
    },
    "135M": {  # SmolLM2
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "1.5B": {  # Qwen2.5
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "intermediate_size": 8960,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
}


def config_of(shape: str) -> PretrainedConfig:
    """The config of a model of this shape: Qwen2 for its own, else Llama."""
    return (Qwen2Config if shape == "1.5B" else LlamaConfig)(**SHAPES[shape])
