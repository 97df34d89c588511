"""rayrl: RL environments for language models, turned into trained models on Ray.

What an environment needs is here; everything else is imported from its own module.
"""

from __future__ import annotations

from rayrl.chat.text_protocol import format_line
from rayrl.chat.tools import format_call
from rayrl.environment.environment import Environment, env
from rayrl.environment.group_reward import GroupReward, group_reward
from rayrl.environment.gymnasium import from_gymnasium
from rayrl.environment.registry import installed_envs, load_env
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
from rayrl.rollout.agent import Agent, Player
from rayrl.rollout.check import check_env
from rayrl.rollout.players import HumanPlayer, PolicyPlayer, ScriptedPlayer
from rayrl.rollout.rollout import GroupPlan, play_episode, play_group, play_groups
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
