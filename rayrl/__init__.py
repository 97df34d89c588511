"""rayrl: RL environments for language models, turned into trained models on Ray.

What an environment needs is here; everything else is imported from its own module.
"""

from __future__ import annotations

from rayrl.agent import Agent, Player
from rayrl.checker import check_env
from rayrl.env import Environment, env
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
from rayrl.groups import GroupReward, group_reward
from rayrl.gymnasium import from_gymnasium
from rayrl.players import HumanPlayer, PolicyPlayer, ScriptedPlayer
from rayrl.registry import installed_envs, load_env
from rayrl.rollout import GroupPlan, play_episode, play_group, play_groups
from rayrl.textcalls import format_line
from rayrl.tools import format_call
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
    "Agent",
    "Completion",
    "ConfigError",
    "DataError",
    "EnvError",
    "Environment",
    "Episode",
    "Failure",
    "Group",
    "GroupPlan",
    "GroupReward",
    "HumanPlayer",
    "InfraError",
    "Message",
    "NumericsError",
    "Player",
    "PolicyPlayer",
    "RayrlError",
    "Reply",
    "Request",
    "RunFailed",
    "Sampling",
    "Scores",
    "ScriptedPlayer",
    "StaleWeights",
    "Task",
    "ToolCall",
    "Turn",
    "VersionSpan",
    "assistant",
    "check_env",
    "derive_seed",
    "env",
    "format_call",
    "format_line",
    "from_gymnasium",
    "group_reward",
    "installed_envs",
    "load_env",
    "play_episode",
    "play_group",
    "play_groups",
    "system",
    "tool",
    "user",
]
