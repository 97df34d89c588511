"""RLlib's PPO learns tic-tac-toe from the board, to play against language models later.

pip install 'rayrl[rllib]' && pip install -e envs/tictactoe
python examples/rllib_tictactoe.py runs/rllib/tictactoe
rayrl eval experiment=tictactoe eval.player=rllib:runs/rllib/tictactoe

docs/rllib.md says what came of it, and plays the policy against a model.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import ray
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


def main() -> None:
    """Train, print a line per iteration, save the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="folder to write")
    parser.add_argument("--iterations", type=int, default=60, help="each of 4,096 moves")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    register_env("tictactoe", game)
    config = (
        PPOConfig()
        .environment("tictactoe")
        .env_runners(num_env_runners=1, num_envs_per_env_runner=32)
        .rl_module(
            rl_module_spec=RLModuleSpec(
                module_class=MaskedPPO,
                model_config=DefaultModelConfig(fcnet_hiddens=[128, 128]),
            )
        )
        .training(
            lr=1e-3,
            gamma=1.0,
            lambda_=0.95,
            entropy_coeff=0.003,
            train_batch_size_per_learner=4096,
            minibatch_size=512,
            num_epochs=8,
        )
        .debugging(seed=given.seed)
    )
    algorithm = config.build_algo()
    began = time.monotonic()
    for iteration in range(given.iterations):
        result = algorithm.train()["env_runners"]
        seconds = time.monotonic() - began
        won = result["episode_return_mean"]
        print(f"{iteration + 1:4} {seconds:6.0f} s  result {won:.3f}", flush=True)
    path = algorithm.save_to_path(given.checkpoint.resolve())
    print(f"saved: {path}")
    algorithm.stop()
    ray.shutdown()


if __name__ == "__main__":
    main()
