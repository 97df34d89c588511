"""RLlib's PPO learns tic-tac-toe from the board, to play against language models later.

pip install 'rayrl[rllib]' && pip install -e envs/tictactoe
python examples/rllib_tictactoe.py runs/rllib/tictactoe
rayrl eval experiment=tictactoe eval.player=rllib:runs/rllib/tictactoe

docs/rllib.md says what came of it, and plays the policy against a model.
"""

from __future__ import annotations

import argparse
import os
import secrets
import time
from pathlib import Path
from typing import Any

import ray
import torch
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.tune.registry import register_env

import rayrl
from rayrl.rllib.masked import MaskedPPO
from rayrl.rollout.gymnasium import GymnasiumEnv


def game(config: dict[str, Any]) -> GymnasiumEnv:
    """The model's seat, against opponents from perfect to random; only the result counts."""
    env = rayrl.load_env("tictactoe").configure(rewards={"format": 0.0, "invalid": 0.0})
    return rayrl.to_gymnasium(env)


def ppo(seed: int) -> PPOConfig:
    """PPO in this process: the game is too small for more of them to pay."""
    network = DefaultModelConfig(fcnet_hiddens=[64, 64])
    return (
        PPOConfig()
        .environment("tictactoe")
        .env_runners(num_env_runners=0, num_envs_per_env_runner=64)
        .rl_module(rl_module_spec=RLModuleSpec(module_class=MaskedPPO, model_config=network))
        .training(
            lr=2e-3,
            gamma=1.0,
            lambda_=0.95,
            entropy_coeff=0.003,
            train_batch_size_per_learner=2048,
            minibatch_size=512,
            num_epochs=5,
        )
        .debugging(seed=seed)
    )


def main() -> None:
    """Train, print a line per iteration, save the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="folder to write, or to go on from")
    parser.add_argument("--iterations", type=int, default=300, help="each of 2,048 moves")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    path = given.checkpoint.resolve()
    # Ray itself would write one to ~/.ray/auth_token, which every later `ray start` then requires.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    torch.set_num_threads(1)  # the network is small
    register_env("tictactoe", game)
    algorithm = ppo(given.seed).build_algo()
    if path.is_dir():
        algorithm.restore_from_path(path)
    began = time.monotonic()
    while algorithm.iteration < given.iterations:
        result = algorithm.train()["env_runners"]["episode_return_mean"]
        seconds = time.monotonic() - began
        print(
            f"{algorithm.iteration:4} {seconds:6.0f} s, {time.process_time():5.0f} s of CPU: "
            f"result {result:.3f}",
            flush=True,
        )
    algorithm.save_to_path(path)
    algorithm.stop()
    ray.shutdown()


if __name__ == "__main__":
    main()
