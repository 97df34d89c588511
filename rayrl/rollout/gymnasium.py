"""rayrl's environments for libraries that train policies on Gymnasium's interface."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

try:
    import gymnasium
    from gymnasium import spaces
except ImportError as error:
    raise ImportError(
        f"to_gymnasium needs Gymnasium ({error}): pip install 'rayrl[gymnasium]'"
    ) from error

from rayrl.environment.environment import Environment, PlayerFunction
from rayrl.environment.registry import load_env
from rayrl.environment.signature import suggestion
from rayrl.errors import ConfigError, EnvError
from rayrl.rollout.agent import Player
from rayrl.rollout.players import ScriptedPlayer, player_function
from rayrl.rollout.stepped import Question, SteppedEpisodes
from rayrl.types import Message, Task

__all__ = ["AnyText", "GymnasiumEnv", "Opponent", "Opponents", "SeatView", "to_gymnasium"]

Opponent = str | PlayerFunction | Player
"""A player's name, as in `env.seats`, a scripted player, or any other `rayrl.Player`."""
Opponents = Mapping[str, Opponent | Sequence[Opponent]]
"""Who plays a seat; of several, one is drawn per episode."""

LONGEST = 100_000  # characters of a text in its space


class AnyText(spaces.Text):
    """Text of whatever characters; only samples are of `string.printable`."""

    def __init__(self, longest: int = LONGEST) -> None:
        super().__init__(longest, min_length=0, charset=string.printable)

    def contains(self, x: object) -> bool:
        """Whether `x` is text."""
        return isinstance(x, str) and len(x) <= self.max_length


class SeatView:
    """What a seat observes, and what its actions say: numbers, or text where there are none.

    Args:
        numeric: use the environment's numeric view; None: if it has one.
        masked: observations of numbers are a dictionary of `observations` and `action_mask`; None:
            if the environment says which actions are legal.

    Attributes:
        observation_space: Box, or Dict of two, or text.
        action_space: Discrete, or text.

    Raises:
        ConfigError: the environment has no such view.
    """

    def __init__(self, env: Environment, numeric: bool | None, masked: bool | None) -> None:
        view = env.numeric if numeric in (None, True) else None
        if numeric and view is None:
            raise ConfigError(
                f"environment {env.name!r} has no numeric view: declare one with "
                "`@env.observation(shape=…, actions=…)`, or leave out numeric=True"
            )
        if masked and view is None:
            raise ConfigError(f"masked=True: environment {env.name!r} is played in text here")
        self._view = view
        self._masked = view is not None and (view.legal is not None if masked is None else masked)
        self.observation_space: spaces.Space[Any] = AnyText()
        self.action_space: spaces.Space[Any] = AnyText()
        if view is not None:
            box = spaces.Box(view.low, view.high, view.shape, np.float32)
            self.action_space = spaces.Discrete(len(view.actions))
            mask = spaces.Box(0.0, 1.0, (len(view.actions),), np.float32)
            self.observation_space = (
                spaces.Dict({"observations": box, "action_mask": mask}) if self._masked else box
            )

    def observe(self, question: Question) -> Any:
        """The observation of a seat that is asked."""
        if self._view is None:
            return "\n\n".join(message.content for message in question.new)
        array = self._view.observation(question.messages)
        if not self._masked:
            return array
        return {"observations": array, "action_mask": self._view.mask(question.messages)}

    def reply(self, action: Any) -> str:
        """What an action says.

        Raises:
            EnvError: it is none.
        """
        if self._view is None:
            if not isinstance(action, str):
                raise EnvError(f"action {action!r} is not text")
            return str(action)
        index = int(action)
        if not 0 <= index < len(self._view.actions):
            raise EnvError(f"action {index}: there are 0 to {len(self._view.actions) - 1}")
        return self._view.actions[index]


class Others:
    """The players of the seats that nobody steps, of which an episode draws."""

    def __init__(self, env: Environment, stepped: Sequence[str], opponents: Opponents) -> None:
        for seat in opponents:
            if seat not in env.seats or seat in stepped:
                other = [one for one in env.seats if one not in stepped]
                known = ", ".join(other) or "none"
                raise ConfigError(
                    f"opponents[{seat!r}]: {env.name!r} has these seats to give away: {known}."
                    f"{suggestion(seat, other)}"
                )
        self._players: dict[str, list[Player]] = {}
        for seat in env.seats:
            if seat in stepped:
                continue
            if not (given := opponents.get(seat)):
                raise ConfigError(
                    f"environment {env.name!r} has a seat {seat!r} too: say who plays it, "
                    f"opponents={{{seat!r}: …}}, with a player's name "
                    f"({', '.join(env.players) or 'it has none'}), rllib:CHECKPOINT or a function"
                )
            named = [given] if isinstance(given, str) or not isinstance(given, Sequence) else given
            self._players[seat] = [_player(env, f"opponents[{seat!r}]", one) for one in named]

    def draw(self, random: np.random.Generator) -> dict[str, Player]:
        """The players of an episode, by seat."""
        return {
            seat: players[int(random.integers(len(players)))] if len(players) > 1 else players[0]
            for seat, players in self._players.items()
        }


def _player(env: Environment, key: str, who: Opponent) -> Player:
    if isinstance(who, str):
        return ScriptedPlayer(player_function(env, key, who))
    return who if hasattr(who, "answer") else ScriptedPlayer(who)


def draw_task(env: Environment, random: np.random.Generator, options: Any) -> tuple[Task, int]:
    """The task and the seed of an episode; `options={"task": …}` gives the task."""
    drawn = env.task(int(random.integers(2**63 - 1)), float(random.random()))
    return (options or {}).get("task", drawn), int(random.integers(2**63 - 1))


class GymnasiumEnv(gymnasium.Env[Any, Any]):
    """A seat of an environment as a `gymnasium.Env`: a step is a turn. See `to_gymnasium`."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["ansi"]}  # type: ignore[misc]

    def __init__(
        self,
        env: Environment,
        seat: str,
        others: Others,
        view: SeatView,
        render_mode: str | None = None,
    ) -> None:
        self.rayrl, self.seat, self.render_mode = env, seat, render_mode
        self._others, self._view = others, view
        self.observation_space, self.action_space = view.observation_space, view.action_space
        self._episodes = SteppedEpisodes(env, [seat])
        self._seen: Any = None
        self._shown: Sequence[Message] = ()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Draw a task, or take that of `options["task"]`, and play up to the seat's first turn.

        Raises:
            EnvError: the episode failed, or ended before the seat was asked.
        """
        super().reset(seed=seed)
        task, episode_seed = draw_task(self.rayrl, self.np_random, options)
        self._episodes.start(task, episode_seed, self._others.draw(self.np_random))
        if self._episodes.episode is not None:
            raise EnvError(
                f"environment {self.rayrl.name!r} ended without asking {self.seat!r}, on {task!r}"
            )
        return self._observe()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Reply; the reward is 0 until the last step, which has that of the episode.

        Raises:
            EnvError: there is no episode under way, the action is none, or the episode failed.
        """
        if self.seat not in self._episodes.questions:
            raise EnvError("step() without an episode under way: call reset() first")
        self._episodes.answer({self.seat: self._view.reply(action)})
        episode = self._episodes.episode
        if episode is None:
            observation, info = self._observe()
            return observation, 0.0, False, False, info
        ending = self.rayrl.ending_function
        if isinstance(self.observation_space, spaces.Text):
            self._seen = ending(episode, self.seat) if ending else ""
        info = {"scores": episode.scores[self.seat], "played": episode}
        return self._seen, episode.rewards[self.seat], True, False, info

    def render(self) -> str | None:  # type: ignore[override]
        """The conversation so far."""
        if self.render_mode is None:
            return None
        return "\n\n".join(f"[{one.role}]\n{one.content}" for one in self._shown)

    def close(self) -> None:
        """End the episode."""
        self._episodes.close()

    def _observe(self) -> tuple[Any, dict[str, Any]]:
        question = self._episodes.questions[self.seat]
        self._seen, self._shown = self._view.observe(question), question.messages
        return self._seen, {"messages": question.new, "state": question.state}


def to_gymnasium(
    env: Environment | str,
    *,
    seat: str | None = None,
    opponents: Opponents | None = None,
    numeric: bool | None = None,
    masked: bool | None = None,
    render_mode: str | None = None,
) -> GymnasiumEnv:
    """Turn a seat of an environment into a `gymnasium.Env`, whose steps are that seat's turns.

    With a numeric view (`Environment.observation`) observations are arrays and actions are indices.
    Without one both are text: what the seat has been told since its last reply, and the reply.
    Messages with their roles are in `info["messages"]`. The last step has the episode's reward, and
    the episode itself in `info["played"]`. `reset` draws a task from the environment's source.

    Args:
        env: an environment or its name, with the tasks that it is to play: `env.training(0.1)`
            leaves out those of evaluation.
        seat: the seat that is stepped; needed where there are several.
        opponents: who plays the other seats: by seat a player's name, `rllib:CHECKPOINT`, a
            scripted player, or a list of these, of which each episode draws one.
        numeric: whether to use the numeric view; None: if there is one.
        masked: whether observations of numbers have the key `action_mask` beside `observations`;
            None: if the environment says which actions are legal.
        render_mode: "ansi": `render` returns the conversation.

    Raises:
        ConfigError: there is no such environment, seat, player or view.
    """
    env = load_env(env) if isinstance(env, str) else env
    if seat is None and len(env.seats) == 1:
        (seat,) = env.seats
    if seat not in env.seats:
        near = "" if seat is None else suggestion(seat, env.seats)
        raise ConfigError(
            f"to_gymnasium(seat={seat!r}): environment {env.name!r} has the seats "
            f"{', '.join(env.seats)}; say which one is stepped.{near}"
        )
    others = Others(env, [seat], opponents or {})
    return GymnasiumEnv(env, seat, others, SeatView(env, numeric, masked), render_mode)
