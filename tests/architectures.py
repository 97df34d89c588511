"""Tiny random models of the architectures that the learner trains, as Hugging Face directories."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["ARCHITECTURES", "VOCABULARY", "save_model"]

VOCABULARY = 64
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
ROUTED = {**EXPERTS, "moe_intermediate_size": 16}
GPT = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}

# name -> what `AutoConfig.for_model` is given; the first word of a name is the model type
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama tied": {**LLAMA, "tie_word_embeddings": True},
    "qwen2 tied": {**LLAMA, "tie_word_embeddings": True},
    "qwen3": {**LLAMA, "head_dim": 8},
    "phi3": LLAMA,
    "starcoder2": {**LLAMA, "embedding_dropout": 0.0, "residual_dropout": 0.0},
    "gemma": {**LLAMA, "head_dim": 8},
    "gemma3_text": {**LLAMA, "head_dim": 8, "sliding_window": 64},
    "gpt2": GPT,
    "gpt2 untied": {**GPT, "tie_word_embeddings": False},
    "gpt_bigcode": GPT,
    "gpt_neox": {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"},
    "opt": {
        **{key: LLAMA[key] for key in LLAMA if key not in ("intermediate_size",)},
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "dropout": 0.0,
    },
    "qwen2_moe": {**LLAMA, **ROUTED, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**LLAMA, **ROUTED, "head_dim": 8},
    "olmoe": {**LLAMA, **EXPERTS},
    "mixtral": {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        **LLAMA,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
    "lfm2": {
        **LLAMA,
        "block_auto_adjust_ff_dim": False,
        "layer_types": ["conv", "full_attention"],
    },
}


def save_model(name: str, folder: Path, spread: float = 0.1, **saving: Any) -> Path:
    """Write the architecture of that name with random weights, those of norms and biases too."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    config = AutoConfig.for_model(name.split()[0], **ARCHITECTURES[name])
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for one in model.parameters():
            noise = spread * torch.randn(one.shape, generator=generator)
            one.copy_(noise if one.ndim > 1 else one + noise)
    model.save_pretrained(folder, **saving)
    return folder


def names_in(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights in a directory's files."""
    from safetensors import safe_open

    found: dict[str, tuple[int, ...]] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return found


Change = Callable[[dict[str, Any]], dict[str, Any]]


def change_weights(folder: Path, change: Change) -> None:
    """Write the weights of a directory again, as `change` of them by name."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    changed = {name: one.clone() for name, one in change(load_file(path)).items()}
    save_file(changed, path, {"format": "pt"})
