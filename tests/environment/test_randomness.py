"""Games that draw from the module-level generators, alone and concurrently."""

from __future__ import annotations

import asyncio
import copy
import random
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rayrl
from rayrl import Agent, GroupPlan, Scores, ScriptedPlayer, Task, check_env
from rayrl.commands.replay import replay
from rayrl.environment.randomness import EpisodeRandom
from rayrl.rollout.agent import Options
from rayrl.rollout.conversation import Conversation
from rayrl.rollout.episode_io import episode_from_json, episode_to_json
from rayrl.rollout.resume import PartialEpisode
from rayrl.rollout.rollout import play_episode, play_groups
from rayrl.rollout.subprocess_env import SubprocessEnv
from rayrl.types import Episode, Message, Turn
from tests.act import collect

# a file that somebody else wrote: it took hold of the functions when it was imported
GAME = """
    import asyncio
    import random
    from random import choice, gauss, getrandbits, random as uniform, seed, shuffle

    import numpy as np
    from numpy.random import rand, seed as numpy_seed

    import rayrl

    def cards():
        deck = list("abcdefgh")
        shuffle(deck)
        return "".join(deck)

    DRAWS = {
        "random.random": lambda: random.random(),
        "random.randint": lambda: random.randint(0, 10**9),
        "random.gauss": lambda: [random.gauss(0, 1), gauss(0, 1), random.gauss(0, 1)],
        "random.sample": lambda: random.sample(range(1000), 5),
        "random.choices": lambda: random.choices(range(1000), k=5),
        "random.randbytes": lambda: random.randbytes(9).hex(),
        "random.getstate": lambda: random.getstate()[1][::99],
        "hidden instance": lambda: random._inst.random(),
        "imported random": lambda: uniform(),
        "imported choice": lambda: choice(range(10**9)),
        "imported getrandbits": lambda: getrandbits(70),
        "imported shuffle": cards,
        "np.random.rand": lambda: float(np.random.rand()),
        "np.random.randint": lambda: int(np.random.randint(10**9)),
        "np.random.normal": lambda: [np.random.normal() for _ in range(3)],
        "np.random.choice": lambda: np.random.choice(1000, 3).tolist(),
        "np.random.sample": lambda: float(np.random.sample()),
        "np.random.permutation": lambda: np.random.permutation(9).tolist(),
        "np.random.get_state": lambda: np.random.get_state()[1][::99].tolist(),
        "np hidden instance": lambda: float(np.random.mtrand._rand.rand()),
        "imported rand": lambda: float(rand()),
    }

    @rayrl.env(tasks=[rayrl.Task(seed=1)], rewards={"luck": 1.0})
    async def game(task, agent):
        for k in range(3):
            for name, draw in DRAWS.items():
                await agent(f"{name}: {draw()}")
            await agent(f"thread: {await asyncio.to_thread(DRAWS['random.random'])}")
            await agent(f"task: {await asyncio.create_task(later())}")
        return {"luck": random.random() + rand()}

    async def later():
        await asyncio.sleep(0)
        return uniform()

    @rayrl.env(tasks=[rayrl.Task(seed=1)], rewards={"luck": 1.0})
    async def seeded(task, agent):
        seed(len(await agent("first")))
        numpy_seed(7)
        for k in range(3):
            await agent(f"{random.random()} {np.random.rand()}")
        return {"luck": 0.0}
"""
PLANS = [GroupPlan(str(k), Task(seed=k), 2, seed=k) for k in range(12)]


@pytest.fixture(scope="module")
def game(tmp_path_factory: pytest.TempPathFactory) -> rayrl.Environment:
    path = tmp_path_factory.mktemp("game") / "game.py"
    path.write_text(textwrap.dedent(GAME))
    return rayrl.load_env(f"{path}:game")


class Slow(ScriptedPlayer):
    """Answers after as many rounds of the event loop as `rounds` has for the question."""

    def __init__(self, rounds: Callable[[int, int], int] = lambda episode, turn: 0) -> None:
        super().__init__(lambda messages, rng: f"{rng.random():.3f}")
        self.rounds = rounds

    async def answer(
        self, conversation: Conversation, new: Sequence[Message], options: Options
    ) -> Turn:
        random.random(), np.random.rand()  # must not affect the episode's draws
        number = int(conversation.session.split("/")[0])
        for _ in range(self.rounds(number, len(conversation.messages) // 2)):
            random.random()
            await asyncio.sleep(0)
        return await super().answer(conversation, new, options)


async def played(
    env: rayrl.Environment, player: Any, plans: Sequence[GroupPlan] = PLANS, **keywords: Any
) -> dict[str, Episode]:
    groups = await collect(env, plans, {"agent": player}, **keywords)
    return {episode.id: episode for group in groups for episode in group.episodes}


async def test_64_concurrent_episodes_equal_sequential_ones(game: rayrl.Environment) -> None:
    alone = await played(game, Slow(), concurrency=1)
    assert all(episode.failure is None for episode in alone.values())
    live = await played(game, Slow(lambda n, turn: (n + turn) % 5), concurrency=64)
    assert live == alone


async def test_episodes_of_a_group_draw_independently_and_seeds_matter(
    game: rayrl.Environment,
) -> None:
    episodes = await played(game, Slow(), concurrency=1)
    assert len({episode.turns[0].prompt for episode in episodes.values()}) == len(episodes)
    assert len({episode.scores["agent"]["luck"] for episode in episodes.values()}) == len(episodes)


async def test_two_workers_play_what_one_plays(game: rayrl.Environment) -> None:
    one = await played(game, Slow(), concurrency=8)
    two = [
        await played(game, Slow(lambda n, turn: turn % 3), PLANS[k::2], concurrency=3)
        for k in (1, 0)
    ]
    assert two[0] | two[1] == one


async def test_a_game_that_seeds_the_generators_itself(game: rayrl.Environment) -> None:
    seeded = rayrl.load_env(game.ref.replace(":game", ":seeded"))
    alone = await played(seeded, Slow(), concurrency=1)
    assert await played(seeded, Slow(lambda n, turn: n % 4), concurrency=64) == alone
    random.seed(5)
    np.random.seed(7)
    prompts = [turn.prompt[0].content for turn in alone["0/0"].turns[1:]]
    assert prompts == [f"{random.random()} {np.random.rand()}" for _ in range(3)]


async def test_a_resumed_episode_equals_an_uninterrupted_one(game: rayrl.Environment) -> None:
    plan = PLANS[3]
    whole = await played(game, Slow(), [plan], concurrency=1)
    for kept in range(0, len(whole["3/1"].turns) + 1, 7):
        recorded = {name: PartialEpisode(one.turns[:kept]) for name, one in whole.items()}
        again = await played(game, Slow(), [plan], concurrency=2, recorded=recorded)
        assert again == whole
        assert all(one.replayed == kept and not one.replay_mismatches for one in again.values())


async def test_a_separate_process_plays_the_same(game: rayrl.Environment) -> None:
    async with SubprocessEnv(game, 2) as isolated:
        apart = await played(isolated, Slow(), PLANS[:2], concurrency=2)
    assert apart == await played(game, Slow(), PLANS[:2], concurrency=1)


async def test_a_stored_episode_is_replayed(game: rayrl.Environment) -> None:
    for episode in (await played(game, Slow(), PLANS[:2], concurrency=2)).values():
        stored = episode_from_json(episode_to_json(episode))
        (found,) = await replay(game, [stored])
        assert (found.kind, found.what) == ("same", "")


@settings(max_examples=15)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.integers(1, 8))
def test_any_interleaving_plays_the_same(pauses: list[int], live: int) -> None:
    @rayrl.env(tasks=[Task(seed=1)], rewards={"luck": 1.0})
    async def game(task: Task, agent: Agent) -> Scores:
        for _ in range(5):
            await agent(f"{random.random()} {random.gauss(0, 1)} {np.random.normal()}")
        return {"luck": random.random()}

    player = Slow(lambda n, turn: pauses[(5 * n + turn) % len(pauses)])
    plans = PLANS[:4]
    alone = asyncio.run(played(game, Slow(), plans, concurrency=1))
    assert asyncio.run(played(game, player, plans, concurrency=live)) == alone


async def test_nothing_changes_outside_of_episodes(game: rayrl.Environment) -> None:
    random.seed(11)
    np.random.seed(11)
    theirs, numpys = random.Random(11), np.random.RandomState(11)
    plain = ScriptedPlayer(lambda messages, rng: f"{random.random()} {np.random.rand()}")
    async for _ in play_groups(game, PLANS[:2], {"agent": plain}, concurrency=4):
        assert random.random() == theirs.random()
        assert random.gauss(0, 1) == theirs.gauss(0, 1)
        assert random.sample(range(99), 9) == theirs.sample(range(99), 9)
        assert np.random.normal() == numpys.normal()
        assert np.random.sample() == numpys.random_sample()
    assert random.getstate() == theirs.getstate()
    assert np.random.get_state(legacy=False)["gauss"] == numpys.get_state(legacy=False)["gauss"]
    with EpisodeRandom(1):
        copied = copy.deepcopy(random._inst)
        assert copied.random() == random.random()  # and not once more from the episode's
        assert type(copied) is random.Random


async def test_numpys_generator_can_be_changed_inside_and_outside() -> None:
    before = np.random.get_bit_generator()
    with EpisodeRandom(1):
        np.random.set_bit_generator(np.random.PCG64(3))
        inside = np.random.rand()
    assert inside == np.random.RandomState(np.random.PCG64(3)).rand()
    assert np.random.get_bit_generator() is before


async def test_scripted_players_and_group_rewards_have_separate_generators() -> None:
    def lottery(episodes: Sequence[Episode]) -> list[float]:
        return [random.random() for _ in episodes]

    @rayrl.env(tasks=[Task(seed=1)], rewards={"n": 1.0, "prize": rayrl.group_reward(lottery, 1.0)})
    async def game(task: Task, agent: Agent) -> Scores:
        for _ in range(3):
            await agent("say")
        return {"n": 1.0}

    player = ScriptedPlayer(lambda messages, rng: str(random.random()))
    alone = await played(game, player, concurrency=1)
    assert await played(game, player, concurrency=64) == alone
    assert len({turn.text for one in alone.values() for turn in one.turns}) == 24 * 3


def test_functions_taken_before_rayrl_was_imported() -> None:
    script = """
        import asyncio, random
        from random import random as uniform, getrandbits, seed, randint
        import numpy as np
        from numpy.random import rand, seed as numpy_seed

        def draws():
            return [uniform(), getrandbits(40), randint(0, 99), random.gauss(0, 1), float(rand())]

        seed(3), numpy_seed(3)
        before = draws()
        seed(3), numpy_seed(3)
        import rayrl
        from rayrl import Task
        from rayrl.rollout.rollout import play_episode

        @rayrl.env(tasks=[Task(seed=1)], rewards={"n": 1.0})
        async def game(task, agent):
            return {"n": float((await agent(str(draws()))) == "x")}

        async def play(seed):
            players = {"agent": rayrl.ScriptedPlayer(lambda messages, rng: "x")}
            episode = await play_episode(game, Task(), players, id="0", seed=seed)
            return episode.turns[0].prompt

        one, other = asyncio.run(play(4)), asyncio.run(play(5))
        assert one != other
        assert draws() == before
        assert asyncio.run(play(4)) == one
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_env_check_accepts_the_module_level_generators(game: rayrl.Environment) -> None:
    assert check_env(game) == []


_board: list[str] = []


async def _shares_a_board(task: Task, agent: Agent) -> Scores:
    _board.clear()
    for _ in range(3):
        _board.append(await agent(f"board {_board}"))
    return {"n": 1.0}


async def _scores_by_a_board(task: Task, agent: Agent) -> Scores:
    _board.clear()
    for _ in range(3):
        _board.append(await agent("move"))
    return {"n": float(len(_board))}


async def _refuses_company(task: Task, agent: Agent) -> Scores:
    assert not _board
    _board.append("here")
    await agent("move")
    _board.clear()
    return {"n": 1.0}


@pytest.mark.parametrize(
    ("play", "said"),
    [
        (_shares_a_board, 'it sends "board ['),
        (_scores_by_a_board, "the same task and replies were scored {'agent': {'n': 3.0}} and"),
        (_refuses_company, "it failed: environment 'play' on task"),
    ],
)
def test_env_check_finds_state_shared_by_live_episodes(play: Any, said: str) -> None:
    _board.clear()
    env = rayrl.env(tasks=lambda seed, u: Task(seed=seed), rewards={"n": 1.0}, name="play")(play)
    (problem,) = check_env(env)
    assert problem.startswith("an episode changes when others are live: on task Task(seed=")
    assert said in problem


def test_env_check_accepts_players_that_are_not_deterministic() -> None:
    """They may call a server; only the environment must be deterministic."""

    @rayrl.env(tasks=lambda seed, u: Task(seed=seed), rewards={"n": 1.0})
    async def game(task: Task, agent: Agent) -> Scores:
        said = [await agent(f"{k}") for k in range(3)]
        await agent.fork()("aside")
        said.append(await agent("on"))
        agent.restart()
        return {"n": float(len("".join([*said, await agent("again")])))}

    dice = random.SystemRandom()
    game.player("server")(lambda messages, rng: "x" * dice.randrange(1, 99))
    assert check_env(game) == []


async def test_the_same_seed_gives_the_same_episode(game: rayrl.Environment) -> None:
    one, two, other = [
        await play_episode(game, Task(), {"agent": Slow()}, id="0", seed=seed) for seed in (6, 6, 7)
    ]
    assert one == two
    assert one.turns[0].prompt != other.turns[0].prompt
