"""State of the running generations as arrays over slots."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rayrl.engine.embedded.sampler import SamplingBatch
from rayrl.types import Request

__all__ = ["DecodeState"]

MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-30, 1e30
MAX_ID = 2**62
STOP_IDS = 8  # initial columns of the stop id table; it grows with requests that have more


@dataclass(slots=True)
class DecodeState:
    """Generation state of each slot, in arrays (slots,) so that no step loops over slots.

    Attributes:
        prompt: number of prompt ids. sampled: number of ids sampled so far. max_new: limit on it.
        stop_ids: (slots, n) padded with -1. has_stop: whether the request has stop strings.
        top: alternatives per sampled id. streams: whether the reader wants deltas.
        logprobs: (slots, max_len) of the ids sampled so far.
    """

    slots: int
    max_len: int
    prompt: NDArray[np.int64] = field(init=False)
    sampled: NDArray[np.int64] = field(init=False)
    max_new: NDArray[np.int64] = field(init=False)
    seed: NDArray[np.uint64] = field(init=False)
    temperature: NDArray[np.float32] = field(init=False)
    top_k: NDArray[np.int64] = field(init=False)
    top_p: NDArray[np.float64] = field(init=False)
    stop_ids: NDArray[np.int64] = field(init=False)
    has_stop: NDArray[np.bool_] = field(init=False)
    top: NDArray[np.int64] = field(init=False)
    streams: NDArray[np.bool_] = field(init=False)
    logprobs: NDArray[np.float32] = field(init=False)

    def __post_init__(self) -> None:
        n = self.slots
        self.prompt = np.zeros(n, dtype=np.int64)
        self.sampled = np.zeros(n, dtype=np.int64)
        self.max_new = np.zeros(n, dtype=np.int64)
        self.seed = np.zeros(n, dtype=np.uint64)
        self.temperature = np.zeros(n, dtype=np.float32)
        self.top_k = np.zeros(n, dtype=np.int64)
        self.top_p = np.ones(n, dtype=np.float64)
        self.stop_ids = np.full((n, STOP_IDS), -1, dtype=np.int64)
        self.has_stop = np.zeros(n, dtype=np.bool_)
        self.top = np.zeros(n, dtype=np.int64)
        self.streams = np.zeros(n, dtype=np.bool_)
        self.logprobs = np.zeros((n, self.max_len), dtype=np.float32)

    def start(self, slot: int, request: Request, max_len: int, streams: bool) -> None:
        """Initialize a slot for a request whose conversation may have `max_len` ids."""
        sampling, stop_ids = request.sampling, request.stop_ids
        self.prompt[slot] = len(request.prompt_ids)
        self.sampled[slot] = 0
        self.max_new[slot] = min(sampling.max_tokens, max_len - len(request.prompt_ids))
        self.seed[slot] = request.seed & 0xFFFFFFFFFFFFFFFF
        # clipped, so that logits / temperature stays finite
        warm = float(np.clip(sampling.temperature, MIN_TEMPERATURE, MAX_TEMPERATURE))
        self.temperature[slot] = warm if sampling.temperature else 0.0
        self.top_k[slot] = min(sampling.top_k, np.iinfo(np.int64).max)
        self.top_p[slot] = sampling.top_p
        extra = len(stop_ids) - self.stop_ids.shape[1]
        if extra > 0:
            self.stop_ids = np.pad(self.stop_ids, ((0, 0), (0, extra)), constant_values=-1)
        self.stop_ids[slot] = -1
        possible = [i if 0 <= i < MAX_ID else -1 for i in stop_ids]  # others are never sampled
        self.stop_ids[slot, : len(stop_ids)] = possible
        self.has_stop[slot] = bool(sampling.stop)
        self.top[slot] = min(request.top_logprobs, np.iinfo(np.int64).max)
        self.streams[slot] = streams

    def sampling_batch(self, slots: NDArray[np.int64]) -> SamplingBatch:
        """Return the sampling parameters for the next id of each of `slots`."""
        return SamplingBatch(
            self.temperature[slots],
            self.top_k[slots],
            self.top_p[slots],
            self.seed[slots],
            self.sampled[slots],
        )
