"""rayrl: RL environments for language models, turned into trained models on Ray.

Three groups of names: to write environments, to play them, to train and evaluate. Importing the
package imports neither torch nor Ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# ruff: isort: off
# --- write environments
from rayrl.chat.text_protocol import format_line
from rayrl.chat.tools import format_call
from rayrl.environment.environment import Environment, env
from rayrl.environment.group_reward import GroupReward, group_reward
from rayrl.environment.gymnasium import from_gymnasium
from rayrl.environment.registry import installed_envs, load_env
from rayrl.environment.rows import Row, rows
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
from rayrl.rollout.check import check_env
from rayrl.rollout.mcp.tools import mcp
from rayrl.types import (
    Completion,
    Episode,
    Failure,
    Group,
    Message,
    Reply,
    Request,
    Sampling,
    Result,
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

# --- play them
from rayrl.rollout.agent import Agent, Options, Player
from rayrl.rollout.conversation import Conversation
from rayrl.rollout.episode_io import read_episodes, write_episodes
from rayrl.rollout.programs.program import Endpoint, Finished, program
from rayrl.rollout.players import HumanPlayer, PolicyPlayer, ScriptedPlayer
from rayrl.rollout.sandbox.box import Sandbox, SandboxResult, sandbox
from rayrl.rollout.sandbox.protection import Protection, sandbox_protection
from rayrl.rollout.rollout import GroupPlan, play_episode, play_group, play_groups

# --- train and evaluate
from rayrl.api import (
    Evaluation,
    Run,
    SynthRun,
    evaluate,
    evaluate_async,
    load_config,
    open_training,
    sft,
    sft_async,
    synth,
    synth_async,
    train,
    train_async,
)
from rayrl.config import Config, EndpointConfig
from rayrl.run.loggers import Jsonl, Logger, TensorBoard, Wandb
# ruff: isort: on

if TYPE_CHECKING:
    from rayrl.learner.advantage import AdvantageInputs, advantages
    from rayrl.learner.batch import make_batch
    from rayrl.learner.loss import LossInputs, LossOutputs
    from rayrl.rllib.multi_agent import to_multi_agent
    from rayrl.rollout.endpoint import EndpointPlayer
    from rayrl.rollout.gymnasium import to_gymnasium
    from rayrl.run.training import StepControl, Training

_LAZY = {  # what imports gymnasium, httpx, numpy, torch or Ray
    "AdvantageInputs": "rayrl.learner.advantage",
    "EndpointPlayer": "rayrl.rollout.endpoint",
    "LossInputs": "rayrl.learner.loss",
    "LossOutputs": "rayrl.learner.loss",
    "StepControl": "rayrl.run.training",
    "Training": "rayrl.run.training",
    "advantages": "rayrl.learner.advantage",
    "make_batch": "rayrl.learner.batch",
    "to_gymnasium": "rayrl.rollout.gymnasium",
    "to_multi_agent": "rayrl.rllib.multi_agent",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'rayrl' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


__all__ = [
    "AdvantageInputs",
    "Agent",
    "Completion",
    "Config",
    "ConfigError",
    "Conversation",
    "DataError",
    "Endpoint",
    "EndpointConfig",
    "EndpointPlayer",
    "EnvError",
    "Environment",
    "Episode",
    "Evaluation",
    "Failure",
    "Finished",
    "Group",
    "GroupPlan",
    "GroupReward",
    "HumanPlayer",
    "InfraError",
    "Jsonl",
    "Logger",
    "LossInputs",
    "LossOutputs",
    "Message",
    "NumericsError",
    "Options",
    "Player",
    "PolicyPlayer",
    "Protection",
    "RayrlError",
    "Reply",
    "Request",
    "Result",
    "Row",
    "Run",
    "RunFailed",
    "Sampling",
    "Sandbox",
    "SandboxResult",
    "Scores",
    "ScriptedPlayer",
    "StaleWeights",
    "StepControl",
    "SynthRun",
    "Task",
    "TensorBoard",
    "ToolCall",
    "Training",
    "Turn",
    "VersionSpan",
    "Wandb",
    "advantages",
    "assistant",
    "check_env",
    "derive_seed",
    "env",
    "evaluate",
    "evaluate_async",
    "format_call",
    "format_line",
    "from_gymnasium",
    "group_reward",
    "installed_envs",
    "load_config",
    "load_env",
    "make_batch",
    "mcp",
    "open_training",
    "play_episode",
    "play_group",
    "play_groups",
    "program",
    "read_episodes",
    "rows",
    "sandbox",
    "sandbox_protection",
    "sft",
    "sft_async",
    "synth",
    "synth_async",
    "system",
    "to_gymnasium",
    "to_multi_agent",
    "tool",
    "train",
    "train_async",
    "user",
    "write_episodes",
]
