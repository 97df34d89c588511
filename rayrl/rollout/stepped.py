"""Episodes that stop where a seat is asked, so that code outside of them can answer step by step.

The environment's coroutine runs on an event loop of its own, which runs only inside `start` and
`answer`: until the next seat is to be answered from outside, or the episode ends. Nothing polls,
and no thread is involved, unless the caller itself is on an event loop (a notebook).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from rayrl.environment.environment import Environment
from rayrl.environment.scoring import with_group_rewards
from rayrl.errors import EnvError
from rayrl.rollout.agent import Options, Player
from rayrl.rollout.conversation import Conversation
from rayrl.rollout.rollout import play_episode
from rayrl.types import Episode, Message, Task, Turn

__all__ = ["Question", "SteppedEpisodes"]


@dataclass(frozen=True, slots=True)
class Question:
    """What a seat is to answer.

    Attributes:
        messages: the whole conversation, `new` included.
        new: messages since the seat's last reply.
        state: key of the state, as the environment gave it.
    """

    messages: tuple[Message, ...]
    new: tuple[Message, ...]
    state: str


class _Outside:
    """The player of a seat that is answered from outside."""

    trainable = False

    def __init__(self, episodes: SteppedEpisodes, seat: str) -> None:
        self._episodes, self._seat = episodes, seat

    async def answer(
        self, conversation: Conversation, new: Sequence[Message], options: Options
    ) -> Turn:
        question = Question((*conversation.messages, *new), tuple(new), options.state)
        text = await self._episodes._ask(self._seat, question)
        return Turn(conversation.seat, tuple(new), text, "stop", state=options.state)


class SteppedEpisodes:
    """Plays one episode after the other, in steps.

    Args:
        env: what is played.
        seats: those that are answered from outside.

    Attributes:
        episode: the episode, once it has ended.
    """

    def __init__(self, env: Environment, seats: Sequence[str]) -> None:
        self.env = env
        self.episode: Episode | None = None
        self._outside = {seat: _Outside(self, seat) for seat in seats}
        self._asked: dict[str, deque[tuple[Question, asyncio.Future[str]]]] = {}
        self._runner: asyncio.Runner | None = None
        self._playing: asyncio.Task[Episode] | None = None
        self._stop = asyncio.Event()  # a seat is asked, or the episode has ended

    @property
    def questions(self) -> dict[str, Question]:
        """By seat, what is to be answered now; of branches that ask at once, the first."""
        return {seat: asked[0][0] for seat, asked in self._asked.items() if asked}

    def start(self, task: Task, seed: int, others: Mapping[str, Player]) -> None:
        """Play until a seat is to be answered; ends the episode before.

        Args:
            seed: for the other players' randomness and the module-level generators.
            others: the players of the seats that are not answered from outside.

        Raises:
            EnvError: the episode failed.
        """
        self._end()
        self.episode = None
        if self._runner is None:
            self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        players = {**self._outside, **others}
        self._run(self._begin(play_episode(self.env, task, players, id="stepped", seed=seed)))

    def answer(self, replies: Mapping[str, str]) -> None:
        """Give seats their replies and play on until one is to be answered, or to the end.

        Raises:
            EnvError: the episode failed.
        """
        for seat, text in replies.items():
            _, answer = self._asked[seat].popleft()
            answer.set_result(text)
        if not any(self._asked.values()):
            self._stop.clear()
            self._run(self._stop.wait())

    def close(self) -> None:
        """End the episode and free the event loop; `start` makes another."""
        self._end()
        runner, self._runner = self._runner, None
        if runner is not None:
            _without_loop(runner.close)  # ends what tasks the environment has left

    def __del__(self) -> None:
        self.close()

    async def _begin(self, episode: Coroutine[Any, Any, Episode]) -> None:
        self._stop = stop = asyncio.Event()
        self._playing = asyncio.create_task(episode)
        self._playing.add_done_callback(lambda _: stop.set())
        await stop.wait()

    async def _ask(self, seat: str, question: Question) -> str:
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        asked = self._asked.setdefault(seat, deque())
        asked.append((question, answer))
        self._stop.set()
        try:
            return await answer
        except asyncio.CancelledError:  # by the environment, which waits no longer
            with suppress(ValueError):  # it was answered in vain
                asked.remove((question, answer))
            raise

    def _run(self, what: Coroutine[Any, Any, object]) -> None:
        """Run the event loop until `what` is done, and take the episode if it has ended.

        Raises:
            EnvError: it has failed.
        """
        self._until_done(what)
        assert self._playing is not None
        if not self._playing.done():
            return
        (episode,) = with_group_rewards(self.env, [self._playing.result()])
        if episode.failure is not None:
            raise EnvError(episode.failure.message)
        self.episode = episode

    def _until_done(self, what: Coroutine[Any, Any, object]) -> None:
        assert self._runner is not None
        loop = self._runner.get_loop()
        _without_loop(lambda: loop.run_until_complete(what))

    def _end(self) -> None:
        playing, self._playing = self._playing, None
        if playing is not None and not playing.done():
            self._until_done(_cancel(playing))
        self._asked.clear()


async def _cancel(playing: asyncio.Task[Episode]) -> None:
    playing.cancel()
    await asyncio.wait([playing])


def _without_loop(call: Callable[[], object]) -> None:
    """Make a call that runs an event loop: in a thread if this one is running another loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        call()
        return
    with ThreadPoolExecutor(1) as thread:
        thread.submit(call).result()
