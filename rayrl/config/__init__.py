"""The configuration: frozen dataclasses, how they are read from plain data, and their checks.

Below `cli.py` nothing else exists: no YAML, no Hydra, no strings to look up.
"""

from __future__ import annotations

from rayrl.config.load import (
    differences,
    from_dict,
    leaves,
    settings,
    stage_config,
    to_dict,
)
from rayrl.config.schema import (
    AlarmConfig,
    AlarmsConfig,
    AlgoConfig,
    ClusterConfig,
    Config,
    EndpointConfig,
    EngineConfig,
    EnvConfig,
    EvalConfig,
    FetchConfig,
    LearnerConfig,
    LoraConfig,
    ModelConfig,
    PlayConfig,
    ReplayConfig,
    RunConfig,
    SamplingConfig,
    ServeConfig,
    SftConfig,
    ShareAlarmConfig,
    Stage,
    SynthConfig,
    TrainConfig,
)
from rayrl.config.setting import Setting
from rayrl.config.validate import validate

__all__ = [
    "AlarmConfig",
    "AlarmsConfig",
    "AlgoConfig",
    "ClusterConfig",
    "Config",
    "EndpointConfig",
    "EngineConfig",
    "EnvConfig",
    "EvalConfig",
    "FetchConfig",
    "LearnerConfig",
    "LoraConfig",
    "ModelConfig",
    "PlayConfig",
    "ReplayConfig",
    "RunConfig",
    "SamplingConfig",
    "ServeConfig",
    "Setting",
    "SftConfig",
    "ShareAlarmConfig",
    "Stage",
    "SynthConfig",
    "TrainConfig",
    "differences",
    "from_dict",
    "leaves",
    "settings",
    "stage_config",
    "to_dict",
    "validate",
]
