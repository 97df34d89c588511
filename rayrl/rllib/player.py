"""The player `rllib:CHECKPOINT`: a policy that RLlib has trained, in any seat.

Only the RLModule is read, no Algorithm, and Ray is not started. `CHECKPOINT` is what
`Algorithm.save_to_path` has written, or a folder in it down to that of the module itself. The
environment's numeric view (`Environment.observation`) says what the policy sees and what its
actions say. Actions are sampled from the policy with the player's generator, or the most likely one
is taken: `rllib:CHECKPOINT@greedy`.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModule
from ray.rllib.core.rl_module.rl_module import RLModule

from rayrl.environment.environment import Environment, PlayerFunction
from rayrl.environment.numeric import NumericView
from rayrl.errors import ConfigError, describe_error, did_you_mean
from rayrl.types import Message

__all__ = ["load"]

GREEDY = "@greedy"
_CLASS = RLModule.CLASS_AND_CTOR_ARGS_FILE_NAME
_INSIDE = ("learner_group/learner/rl_module", "learner/rl_module", "rl_module")
_CONNECTORS = "env_runner/env_to_module_connector"
_HARMLESS = {  # connectors that leave a single observation as it is
    "AddObservationsFromEpisodesToBatch",
    "AddTimeDimToBatchAndZeroPad",
    "AddStatesFromEpisodesToBatch",
    "AgentToModuleMapping",
    "BatchIndividualItems",
    "NumpyToTensor",
}


def load(name: str, environment: Environment) -> PlayerFunction:
    """The policy in a checkpoint as a player of an environment.

    Args:
        name: `CHECKPOINT` or `CHECKPOINT@greedy`.

    Raises:
        ConfigError: there is no such checkpoint, or its policy does not fit the environment.
    """
    path, greedy = name.removesuffix(GREEDY), name.endswith(GREEDY)
    view = environment.numeric
    if view is None:
        raise ConfigError(
            f"environment {environment.name!r} has no numeric view, so that a policy cannot see "
            "its messages: declare one with `@env.observation(shape=…, actions=…)`"
        )
    module = _module(_module_folder(Path(path).expanduser().resolve()))
    _check_fits(module, view, environment.name)

    def policy(messages: Sequence[Message], rng: random.Random) -> str:
        mask = view.mask(messages)
        logits = _logits(module, view.observation(messages), mask)
        legal = [action for action in range(len(view.actions)) if mask[action]]
        best = max(logits[action] for action in legal)
        if greedy:
            return view.actions[next(one for one in legal if logits[one] == best)]
        weights = [math.exp(logits[action] - best) for action in legal]
        return view.actions[rng.choices(legal, weights)[0]]

    policy.__name__ = f"rllib:{name}"
    return policy


def _module_folder(path: Path) -> Path:
    """Where the only RLModule of a checkpoint is."""
    if not path.is_dir():
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*") if p.is_dir()])
        raise ConfigError(
            f"there is no folder {path}.{near} Give what `Algorithm.save_to_path` has written; on "
            "a cluster, on storage that all nodes share."
        )
    if (path / "policies").is_dir() or (path / "policy_state.pkl").is_file():
        raise ConfigError(
            f"{path} is of RLlib's old API stack: train with the new one, which is the default"
        )
    odd = {one.name for one in (path / _CONNECTORS).glob("*") if one.is_dir()} - _HARMLESS
    if odd:
        raise ConfigError(
            f"{path} was trained with the connectors {', '.join(sorted(odd))}, which change what "
            "the policy observes; only the module is loaded here. Put what they do into the "
            "environment's observation function, and train without them."
        )
    whole = next((path / inside for inside in _INSIDE if (path / inside).is_dir()), path)
    modules = sorted(one.parent for one in whole.glob(f"*/{_CLASS}"))
    if len(modules) > 1:
        raise ConfigError(
            f"{path} has several policies: name the folder of one: {', '.join(map(str, modules))}"
        )
    if modules:
        return modules[0]
    if (whole / _CLASS).is_file():
        return whole
    inner = sorted(one.parent for one in path.glob("*/rllib_checkpoint.json"))
    inner += sorted(path.glob("checkpoint_*"))
    remedy = f" Name the checkpoint in it: {inner[-1]}." if inner else ""
    raise ConfigError(f"{path} is no checkpoint of RLlib: it has no {_CLASS}.{remedy}")


def _module(folder: Path) -> Any:
    """The RLModule in a folder."""
    try:
        # of RLlib's own use of what it has deprecated
        logging.getLogger("ray._common.deprecation").setLevel(logging.ERROR)
        module: Any = RLModule.from_checkpoint(folder)
    except Exception as error:
        raise ConfigError(
            f"the policy at {folder} cannot be read: {describe_error(error)}"
        ) from error
    if isinstance(module, MultiRLModule):
        raise ConfigError(f"{folder} has several policies, or none: name the folder of one")
    if module.is_stateful():
        raise ConfigError(
            f"{type(module).__name__} at {folder} is recurrent: what it remembers is not in a "
            "conversation. Train without use_lstm, with the history in the observation."
        )
    if not isinstance(module, torch.nn.Module):
        raise ConfigError(f"{folder} is not a policy in torch: {type(module).__name__}")
    return module.eval()


def _check_fits(module: Any, view: NumericView, name: str) -> None:
    """Raise ConfigError unless the policy sees and does what the environment declares."""
    seen, acts = module.observation_space, module.action_space
    box = (
        seen["observations"]
        if isinstance(seen, spaces.Dict) and "observations" in seen.spaces
        else seen
    )
    if getattr(box, "shape", None) != view.shape:
        raise ConfigError(
            f"the policy observes {box}, and environment {name!r} gives the shape {view.shape}: "
            "it was trained on another environment, or on a flattened or filtered observation"
        )
    if not isinstance(acts, spaces.Discrete) or acts.n != len(view.actions) or acts.start:
        raise ConfigError(
            f"the policy acts in {acts}, and environment {name!r} has {len(view.actions)} actions"
        )
    low, high = max(view.low, -1.0), min(view.high, 1.0)
    try:
        middle = np.full(view.shape, (low + high) / 2, np.float32)
        found = _logits(module, middle, np.ones(len(view.actions), np.float32))
    except Exception as error:
        raise ConfigError(
            f"{type(module).__name__} does not answer an observation of environment {name!r}: "
            f"{describe_error(error)}"
        ) from error
    if len(found) != len(view.actions):
        raise ConfigError(
            f"{type(module).__name__} gives {len(found)} numbers for {len(view.actions)} actions"
        )


def _logits(module: Any, observation: Any, mask: Any) -> list[float]:
    """The policy's logits of each action."""
    batch: Any = torch.from_numpy(observation)[None]  # (1, *shape)
    if isinstance(module.observation_space, spaces.Dict):
        batch = {"observations": batch, "action_mask": torch.from_numpy(mask)[None]}
    with torch.no_grad():
        outputs = module.forward_inference({Columns.OBS: batch})
    if Columns.ACTION_DIST_INPUTS not in outputs:
        raise ConfigError(
            f"it gives {', '.join(map(str, outputs))} and no {Columns.ACTION_DIST_INPUTS}, as the "
            "modules of PPO, APPO and IMPALA do"
        )
    values: list[float] = outputs[Columns.ACTION_DIST_INPUTS][0].tolist()
    return values
