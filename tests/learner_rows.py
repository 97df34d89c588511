"""Rows and a model for the learner's tests."""

from pathlib import Path
from typing import Any

import numpy as np

from rayrl.learner.batch import Trajectory

UPDATES = 3
VOCABULARY = 40


def make_rows(seed: int, groups: int = 4, size: int = 4) -> list[Trajectory]:
    """Ragged rows: a prompt a group shares, turns that siblings sometimes share."""
    rng = np.random.default_rng(seed)
    rows = []
    for g in range(groups):
        prompt = np.concatenate([[1, 2, 3], rng.integers(0, VOCABULARY, 5)])
        for _ in range(size):
            ids, mask = [prompt], [np.zeros(8, bool)]
            for _ in range(int(rng.integers(1, 4))):
                n = int(rng.integers(1, 5))
                ids += [rng.integers(0, 2, n), np.array([4, 5])]
                mask += [np.ones(n, bool), np.zeros(2, bool)]
            loss = np.concatenate(mask)
            advantages = np.where(loss, rng.normal(), 0).astype(np.float32)
            old = np.where(loss, -3.7 + 0.1 * rng.normal(size=len(loss)), 0).astype(np.float32)
            flat = np.concatenate(ids).astype(np.int32)
            rows.append(Trajectory(flat, loss, old, advantages, group=g))
    return rows


def make_model(folder: Path, **changes: Any) -> Path:
    """A tiny Llama with grouped queries and tied embeddings, saved."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder
