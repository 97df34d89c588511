"""Attention on a CPU in C++, compiled on first use where there is a compiler."""

from __future__ import annotations

from rayrl.native.attention import Contexts, attend, attend_trie, lanes
from rayrl.native.library import Unavailable, missing

__all__ = ["Contexts", "Unavailable", "attend", "attend_trie", "lanes", "missing"]
