"""Inference engines; `open_engine` opens the one that a config selects."""

from __future__ import annotations

from pathlib import Path

from rayrl.config import EngineConfig, LoraConfig
from rayrl.engine.protocol import Engine, Generator
from rayrl.errors import ConfigError, did_you_mean
from rayrl.weights.model_dir import model_dir

__all__ = ["Engine", "Generator", "open_engine"]

KINDS = ("embedded", "vllm")


def open_engine(
    path: str | Path,
    config: EngineConfig,
    *,
    version: int = 0,
    raw_logprobs: bool = False,
    sleeps: bool = False,
    lora: LoraConfig | None = None,
) -> Engine:
    """Open the engine `config.kind` for the model `path` (as `model.path`) at weights `version`.

    Args:
        raw_logprobs: return the model's own logprobs (before temperature, top-k and top-p, greedy
            ids included), for display, instead of those of the sampling distribution, for training.
        sleeps: whether the engine shares its GPU with a learner and sleeps while that works.
        lora: adapters that are pushed instead of whole weights; vllm only.

    Raises:
        ConfigError: no such kind, or the engine cannot run this model.
    """
    path = model_dir(str(path))
    if config.kind == "embedded":
        # imported here because it imports torch, which users of the protocol alone do not need
        from rayrl.engine.embedded.engine import EmbeddedEngine

        return EmbeddedEngine.load(path, config, version=version, raw_logprobs=raw_logprobs)
    if config.kind == "vllm":
        from rayrl.engine.vllm.engine import VllmEngine

        return VllmEngine(
            path, config, version=version, raw_logprobs=raw_logprobs, sleeps=sleeps, lora=lora
        )
    raise ConfigError(
        f"engine.kind={config.kind!r}: no such engine.{did_you_mean(config.kind, KINDS)}"
    )
