"""What the tests that open a vLLM on this machine's CPU have in common."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rayrl.config import EngineConfig
from rayrl.weights.model_dir import EMBEDDED, model_dir

__all__ = ["CONFIG", "MARKS", "load"]

MARKS = [
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.filterwarnings("ignore"),  # vLLM's own
]
CONFIG = EngineConfig(kind="vllm", dtype="float32", max_live=32, max_len=256)


def load() -> Any:
    """The model that ships with rayrl, as transformers has it."""
    return AutoModelForCausalLM.from_pretrained(model_dir(EMBEDDED), dtype=torch.float32)
