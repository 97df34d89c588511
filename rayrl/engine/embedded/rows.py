"""The generations under way, as arrays."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rayrl.engine.embedded.sampler import SamplingBatch
from rayrl.types import Request

__all__ = ["DecodeState"]

COLDEST, HOTTEST = 1e-30, 1e30  # temperatures
MOST_IDS = 2**62
STOP_IDS = 8  # columns of the table of stop ids; it grows when a request has more


@dataclass(slots=True)
class DecodeState:
    """What is being generated in each slot; arrays (slots,) so that no step loops over rows.

    Attributes:
        prompt: prompt ids. sampled: ids sampled so far. most: ids to sample at most.
        stop_ids: (slots, n) padded with -1. has_stop: whether there are stop strings.
        top: alternatives wanted for each id. streams: whether parts are told as they are made.
        logprobs: (slots, max_len) of the ids sampled so far.
    """

    slots: int
    max_len: int
    prompt: NDArray[np.int64] = field(init=False)
    sampled: NDArray[np.int64] = field(init=False)
    most: NDArray[np.int64] = field(init=False)
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
        self.most = np.zeros(n, dtype=np.int64)
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
        """Set a slot up for a request, whose conversation may have `max_len` ids."""
        sampling, stop_ids = request.sampling, request.stop_ids
        self.prompt[slot] = len(request.prompt_ids)
        self.sampled[slot] = 0
        self.most[slot] = min(sampling.max_tokens, max_len - len(request.prompt_ids))
        self.seed[slot] = request.seed & 0xFFFFFFFFFFFFFFFF
        warm = float(np.clip(sampling.temperature, COLDEST, HOTTEST))  # finite when divided by
        self.temperature[slot] = warm if sampling.temperature else 0.0
        self.top_k[slot] = min(sampling.top_k, np.iinfo(np.int64).max)
        self.top_p[slot] = sampling.top_p
        short = len(stop_ids) - self.stop_ids.shape[1]
        if short > 0:
            self.stop_ids = np.pad(self.stop_ids, ((0, 0), (0, short)), constant_values=-1)
        self.stop_ids[slot] = -1
        known = [one if 0 <= one < MOST_IDS else -1 for one in stop_ids]  # others never come
        self.stop_ids[slot, : len(stop_ids)] = known
        self.has_stop[slot] = bool(sampling.stop)
        self.top[slot] = min(request.top_logprobs, np.iinfo(np.int64).max)
        self.streams[slot] = streams

    def draws(self, slots: NDArray[np.int64]) -> SamplingBatch:
        """How the next id of each of `slots` is drawn."""
        return SamplingBatch(
            self.temperature[slots],
            self.top_k[slots],
            self.top_p[slots],
            self.seed[slots],
            self.sampled[slots],
        )
