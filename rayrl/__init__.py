"""rayrl: RL environments for language models, turned into trained models on Ray.

What an environment needs is here; everything else is imported from its own module.
"""

from __future__ import annotations

from rayrl.env import Environment, GroupReward, env, group_reward
from rayrl.errors import (
    ConfigError,
    DataError,
    EnvError,
    InfraError,
    NumericsError,
    RayrlError,
    RunFailed,
    StaleWeights,
)
from rayrl.gymnasium import from_gymnasium
from rayrl.registry import installed_envs, load_env
from rayrl.types import (
    Completion,
    Episode,
    Failure,
    Group,
    Message,
    Reply,
    Request,
    Sampling,
    Scores,
    Task,
    ToolCall,
    Turn,
    VersionSpan,
    assistant,
    derive_seed,
    system,
    tool,
    user,
)

__all__ = [
    "Completion",
    "ConfigError",
    "DataError",
    "EnvError",
    "Environment",
    "Episode",
    "Failure",
    "Group",
    "GroupReward",
    "InfraError",
    "Message",
    "NumericsError",
    "RayrlError",
    "Reply",
    "Request",
    "RunFailed",
    "Sampling",
    "Scores",
    "StaleWeights",
    "Task",
    "ToolCall",
    "Turn",
    "VersionSpan",
    "assistant",
    "derive_seed",
    "env",
    "from_gymnasium",
    "group_reward",
    "installed_envs",
    "load_env",
    "system",
    "tool",
    "user",
]
