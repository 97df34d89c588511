"""An environment with several seats as RLlib's MultiAgentEnv, for self-play and leagues."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

try:
    from ray.rllib.env.multi_agent_env import MultiAgentEnv
except ImportError as error:
    raise ImportError(
        f"to_multi_agent needs RLlib ({error}): pip install 'rayrl[rllib]'"
    ) from error

from rayrl.environment.environment import Environment
from rayrl.environment.registry import load_env
from rayrl.environment.signature import suggestion
from rayrl.errors import ConfigError, EnvError
from rayrl.rollout.gymnasium import Opponents, Others, SeatView, draw_task
from rayrl.rollout.stepped import SteppedEpisodes

__all__ = ["RayrlMultiAgentEnv", "to_multi_agent"]

_ByAgent = dict[str, Any]


class RayrlMultiAgentEnv(MultiAgentEnv):  # type: ignore[misc]
    """The seats of an environment as agents; those observe who are to reply. See `to_multi_agent`.

    The last step has every agent's reward of the episode and its last observation once more; an
    agent that was never asked does not occur.
    """

    def __init__(
        self, env: Environment, seats: Sequence[str], others: Others, view: SeatView
    ) -> None:
        super().__init__()
        self.rayrl = env
        self.agents = self.possible_agents = list(seats)
        self.observation_spaces = dict.fromkeys(seats, view.observation_space)
        self.action_spaces = dict.fromkeys(seats, view.action_space)
        self._others, self._view = others, view
        self._episodes = SteppedEpisodes(env, seats)
        self._seen: _ByAgent = {}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[_ByAgent, _ByAgent]:
        """Draw a task, or take that of `options["task"]`, and play until a seat is asked.

        Raises:
            EnvError: the episode failed, or ended before anyone was asked.
        """
        super().reset(seed=seed, options=options)
        random: np.random.Generator = self.np_random
        task, episode_seed = draw_task(self.rayrl, random, options)
        self._seen = {}
        self._episodes.start(task, episode_seed, self._others.draw(random))
        if self._episodes.episode is not None:
            raise EnvError(f"environment {self.rayrl.name!r} ended before anyone was asked: {task}")
        return self._observe()

    def step(
        self, action_dict: _ByAgent
    ) -> tuple[_ByAgent, _ByAgent, _ByAgent, _ByAgent, _ByAgent]:
        """Reply for the agents that observed.

        Raises:
            EnvError: an agent replies that was not asked, or the episode failed.
        """
        asked = self._episodes.questions
        if set(action_dict) != set(asked):
            raise EnvError(
                f"step() with actions of {', '.join(action_dict) or 'nobody'}: "
                f"{', '.join(asked) or 'nobody'} is to reply; call reset() first if nobody is"
            )
        self._episodes.answer({seat: self._view.reply(one) for seat, one in action_dict.items()})
        episode = self._episodes.episode
        over = episode is not None
        flags = {"__all__": over}, {"__all__": False}
        if episode is None:
            observations, infos = self._observe()
            return observations, dict.fromkeys(observations, 0.0), *flags, infos
        seats = list(self._seen)
        rewards = {seat: episode.rewards[seat] for seat in seats}
        infos = {seat: {"scores": episode.scores[seat]} for seat in seats}
        return dict(self._seen), rewards, *flags, infos

    def close(self) -> None:
        """End the episode."""
        self._episodes.close()

    def _observe(self) -> tuple[_ByAgent, _ByAgent]:
        questions = self._episodes.questions
        seen = {seat: self._view.observe(question) for seat, question in questions.items()}
        self._seen |= seen
        return seen, {
            seat: {"messages": question.new, "state": question.state}
            for seat, question in questions.items()
        }


def to_multi_agent(
    env: Environment | str,
    *,
    seats: Sequence[str] | None = None,
    opponents: Opponents | None = None,
    numeric: bool | None = None,
    masked: bool | None = None,
) -> RayrlMultiAgentEnv:
    """Turn an environment into RLlib's MultiAgentEnv, an agent for each seat.

    Args:
        env: an environment or its name, with the tasks that it is to play.
        seats: those that RLlib plays; None: all.
        opponents: who plays the others, as for `rayrl.to_gymnasium`.
        numeric: as there.
        masked: as there.

    Raises:
        ConfigError: there is no such environment, seat, player or view.
    """
    env = load_env(env) if isinstance(env, str) else env
    stepped = tuple(env.seats if seats is None else seats)
    for seat in stepped:
        if seat not in env.seats:
            near = suggestion(seat, env.seats)
            raise ConfigError(
                f"to_multi_agent(seats={list(stepped)}): environment {env.name!r} has no seat "
                f"{seat!r}.{near}"
            )
    others = Others(env, stepped, opponents or {})
    return RayrlMultiAgentEnv(env, stepped, others, SeatView(env, numeric, masked))
