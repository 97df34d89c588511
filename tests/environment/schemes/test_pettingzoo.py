"""PettingZoo's games: seats, what each is shown, legal and illegal moves, scores, refusals."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pettingzoo
import pytest

import rayrl
from rayrl.environment.environment import Environment
from rayrl.environment.registry import environment_of
from rayrl.environment.schemes.pettingzoo_guides import guide_of
from rayrl.environment.schemes.spaces import choices, parse
from rayrl.errors import ConfigError
from rayrl.rollout.check import check_env
from rayrl.rollout.players import ScriptedPlayer
from rayrl.rollout.rollout import play_episode
from rayrl.types import Episode

CLASSIC = sorted(game for game in pettingzoo.aec_registry if game.startswith("classic/"))

OWN_GAMES = '''
import numpy as np
import pettingzoo
from gymnasium import spaces


class Sums(pettingzoo.ParallelEnv):
    """At once, each agent of three names two numbers; it earns their sum. Two rounds."""

    metadata = {"name": "sums", "render_modes": []}
    render_mode = None

    def __init__(self, agents=3, deep=False):
        self.possible_agents = [f"no. {k}" for k in range(agents)]
        self.deep = deep

    def observation_space(self, agent):
        image = spaces.Box(0, 255, (9, 9, 3), np.uint8)
        return image if self.deep else spaces.Dict({"round": spaces.Discrete(3)})

    def action_space(self, agent):
        return spaces.MultiDiscrete([3, 3])

    def reset(self, seed=None, options=None):
        self.agents, self.round = self.possible_agents[:], 0
        return self._all({"round": 0}), self._all({})

    def step(self, actions):
        self.round += 1
        over = self.round == 2
        rewards = {agent: float(actions[agent].sum()) for agent in self.agents}
        told = (self._all({"round": self.round}), rewards, self._all(over), self._all(False))
        infos = self._all({})
        self.agents = [] if over else self.agents
        return *told, infos

    def _all(self, value):
        return {agent: value for agent in self.possible_agents}


class Lamps(pettingzoo.AECEnv):
    """One agent switches off three lamps, shown as text; its mask stands in its info."""

    metadata = {"name": "lamps", "render_modes": ["ansi"]}

    def __init__(self, render_mode=None):
        self.render_mode, self.possible_agents = render_mode, [7]

    def observation_space(self, agent):
        return spaces.Box(0, 255, (9, 9, 3), np.uint8)

    def action_space(self, agent):
        return spaces.Discrete(3, start=1)

    def observe(self, agent):
        return np.zeros((9, 9, 3), np.uint8)

    def reset(self, seed=None, options=None):
        self.agents, self.agent_selection, self.lit = [7], 7, np.ones(3, np.int8)
        self.rewards, self._cumulative_rewards = {7: 0}, {7: 0}
        self.terminations, self.truncations = {7: False}, {7: False}
        self.infos = {7: {"action_mask": self.lit}}

    def step(self, action):
        if self.terminations[7]:
            return self._was_dead_step(action)
        assert self.lit[action - 1]
        self.lit[action - 1] = 0
        self.rewards, self._cumulative_rewards = {7: 1}, {7: 1}
        self.terminations = {7: not self.lit.any()}

    def render(self):
        on = [f"\\x1b[33m{k}\\x1b[0m" for k in (1, 2, 3)]
        return " ".join(lamp if lit else "-" for lamp, lit in zip(on, self.lit))


def sums(**make):
    return Sums(**make)


pettingzoo.register("parallel", "zz/sums-v1", entry_point=Sums)
'''


@pytest.fixture
def games(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with two games, and a registry that forgets them."""
    monkeypatch.setattr(
        "pettingzoo.env_registry.registration.parallel_registry", dict(pettingzoo.parallel_registry)
    )
    monkeypatch.setitem(pettingzoo.parallel_registry, "zz/sums-v1", None)
    del pettingzoo.parallel_registry["zz/sums-v1"]
    file = tmp_path / "zz_games.py"
    file.write_text(OWN_GAMES)
    return file


def load(name: str, **settings: Any) -> Environment:
    return rayrl.load_env(f"pettingzoo:{name}").configure(settings)


def play(env: Environment, moves: Sequence[str] = (), number: int = 0) -> Episode:
    """These moves in the order in which seats are asked, or those of the player `random`."""
    left = iter(moves)
    player = ScriptedPlayer((lambda messages, rng: next(left)) if moves else env.players["random"])
    (task,) = env.tasks(number, 1)
    players = dict.fromkeys(env.seats, player)
    episode = asyncio.run(play_episode(env, task, players, id="e", seed=number))
    assert episode.failure is None, episode.failure
    return episode


def asked(episode: Episode) -> list[str]:
    return [turn.prompt[-1].content for turn in episode.turns]


def test_a_game_of_tic_tac_toe() -> None:
    env = load("classic/tictactoe_v3")
    assert env.seats == ("player_1", "player_2")
    won = play(env, ["4", "0", " <action>2</action>", "1", "6"])
    assert won.scores == {
        "player_1": {"reward": 1.0, "illegal": 0.0},
        "player_2": {"reward": -1.0, "illegal": 0.0},
    }
    first, second, third, _, fifth = asked(won)
    assert first.startswith("You are player_1.\nTic-tac-toe")
    assert first.endswith("\n\n. . .\n. . .\n. . .\nLegal actions: 0 to 8")
    assert second.startswith("You are player_2.\nTic-tac-toe")
    assert second.endswith(". . .\n. 1 .\n. . .\nLegal actions: 0 to 3, 5 to 8")
    assert third == "1 . .\n. 0 .\n. . .\nLegal actions: 1 to 3, 5 to 8", "only what is new"
    assert fifth == "1 1 0\n. 0 .\n. . .\nLegal actions: 3, 5 to 8"


def test_illegal_replies_change_nothing_and_are_told() -> None:
    env = load("classic/tictactoe_v3", tries=3)
    episode = play(env, ["4", "4", "nothing", "0", "2", "9", "1", "6"])
    assert episode.scores["player_1"] == {"reward": 1.0, "illegal": 0.0}
    assert episode.scores["player_2"] == {"reward": -1.0, "illegal": 3 / 5}
    told = "That is no legal action.\nLegal actions: 0 to 3, 5 to 8"
    assert asked(episode)[2:4] == [told, told]
    assert asked(episode)[4] == "1 . .\n. 0 .\n. . .\nLegal actions: 1 to 3, 5 to 8"


def test_after_some_illegal_replies_an_action_is_drawn() -> None:
    env = load("classic/tictactoe_v3", tries=2, max_turns=7)
    moves = ["4", "4", "4", "no", "no", "no", "no"]
    first, again = play(env, moves), play(env, moves)
    assert asked(first) == asked(again), "siblings meet the same draws"
    drawn = re.match(r"That was no legal action. (\d) was played for you.", asked(first)[5])
    assert drawn
    (mark,) = [k for k, one in enumerate(re.findall(r"[.01]", asked(first)[3][:17])) if one == "1"]
    assert mark == int(drawn[1]) != 4
    assert len(first.turns) == 7
    assert {seat: s["illegal"] for seat, s in first.scores.items()} == {
        "player_1": 2 / 3,
        "player_2": 1.0,
    }


@pytest.mark.filterwarnings("ignore:.*precision lowered by casting:UserWarning")
@pytest.mark.parametrize("game", CLASSIC)
def test_scores_are_what_pettingzoo_itself_counts(game: str) -> None:
    env = load(game, max_turns=40)
    episode = play(env, number=5)
    (task,) = env.tasks(5, 1)
    world = pettingzoo.make("aec", game)
    world.reset(seed=task.seed % 2**31)
    total = dict.fromkeys(world.possible_agents, 0.0)
    turns = iter(episode.turns)
    moves = guide_of(game).moves
    for who in world.agent_iter():
        observation, reward, terminated, truncated, _ = world.last()
        total[who] += float(reward)
        if terminated or truncated:
            world.step(None)
            continue
        turn = next(turns, None)
        if turn is None:
            break  # cut off
        assert turn.seat == who
        space = world.action_space(who)
        offered = moves(world) if moves else choices(space, task.actions)
        action = parse(turn.text, space, offered)
        if isinstance(observation, dict):
            assert observation["action_mask"][action] == 1
        world.step(action)
    assert next(turns, None) is None
    assert {seat: scores["reward"] for seat, scores in episode.scores.items()} == total
    assert all(scores["illegal"] == 0 for scores in episode.scores.values())


@pytest.mark.parametrize("game", CLASSIC)
def test_games_are_the_same_in_another_process_and_differ_by_seed(game: str) -> None:
    env = load(game, max_turns=10)
    first = play(env, number=3)
    assert play(environment_of(env.spec), number=3) == first
    assert [t.text for t in play(env, number=4).turns] != [t.text for t in first.turns]


def test_chess_is_rendered_and_moves_have_their_names() -> None:
    mate = play(load("classic/chess_v6"), ["f2f3", "e7e5", "G2G4", "d8h4"])
    assert [scores["reward"] for scores in mate.scores.values()] == [-1.0, 1.0]
    assert "r n b q k b n r\np p p p p p p p\n. . ." in asked(mate)[0]
    assert ", g2g4" in asked(mate)[2]
    assert "f1e1" not in asked(mate)[0]


def test_hanabi_hides_ones_own_cards() -> None:
    episode = play(load("classic/hanabi_v5", make={"players": 3}, max_turns=12))
    assert set(episode.scores) == {"player_0", "player_1", "player_2"}
    own = re.search(r"Cur player\n((?:.*\n)+?)-----", asked(episode)[0])
    assert own
    assert re.fullmatch(r"(XX \|\| XX\|RYGWB12345\n)+", own[1])
    assert "Reveal player +2 " in asked(episode)[0]


def test_names_of_actions_and_rules_are_settings() -> None:
    game = play(load("classic/leduc_holdem", rules="Poker."))
    assert asked(game)[0].startswith("You are player_")
    assert (
        "\nPoker.\nAnswer with one legal action only.\n\n36 numbers, all 0 but 1 at"
        in asked(game)[0]
    )
    assert {turn.text for turn in game.turns} <= {"call", "raise", "fold", "check"}
    numbered = play(load("classic/leduc_holdem", actions=[]))
    assert {turn.text for turn in numbered.turns} <= set("0123")
    named = load("classic.rps-v2", actions=["rock", "paper", "scissors"], make={"max_cycles": 2})
    rounds = play(named, ["Paper", "rock", "paper", "rock"])
    assert [scores["reward"] for scores in rounds.scores.values()] == [2.0, -2.0]
    assert "Actions: rock, paper, scissors. Answer with one of them only." in asked(rounds)[0]
    assert asked(rounds)[2] == "Reward: 1\n\n0"


def test_planes_of_a_board_are_a_setting() -> None:
    small = {"make": {"board_size": 3}, "max_turns": 1}
    assert (
        ". . .\n. . .\n. . .\nLegal actions: 0 to 9"
        in asked(play(load("classic/go_v5", **small)))[0]
    )
    every = asked(play(load("classic/go_v5", **small, planes=[])))[0]
    assert "plane 0: all 0" in every
    assert "plane 16: all " in every


def test_agents_that_act_at_once(games: Path) -> None:
    env = load(f"{games}:Sums", make={"agents": 2})
    assert env.seats == ("no__0", "no__1")
    episode = play(env, ["2 2", "1, 0", "2 1", "3 0", "0 0"])
    assert episode.scores == {
        "no__0": {"reward": 7.0, "illegal": 0.0},
        "no__1": {"reward": 1.0, "illegal": 1 / 3},
    }
    first, second, third, fourth, fifth = asked(episode)
    how = "An action has these whole numbers: 0 to 2, 0 to 2. Answer with the numbers only."
    assert first == f"You are no. 0.\n{how}\n\n0"
    assert second == f"You are no. 1.\n{how}\n\n0"
    assert (third, fourth) == ("Reward: 4\n\n1", "Reward: 1\n\n1")
    assert fifth == f"That is no legal action.\n{how}"
    assert check_env(env) == []


def test_a_rendering_as_text_and_a_mask_in_the_info(games: Path) -> None:
    env = load(f"{games}:Lamps")
    assert env.seats == ("agent_7",)
    episode = play(env, ["2", "2", "3", "1"])
    assert episode.scores == {"agent_7": {"reward": 3.0, "illegal": 0.25}}
    assert asked(episode)[0].endswith("\n\n1(yellow) 2(yellow) 3(yellow)\nLegal actions: 1 to 3")
    assert asked(episode)[1] == "Reward: 1\n\n1(yellow) - 3(yellow)\nLegal actions: 1, 3"
    with pytest.raises(ConfigError, match="images of 9 × 9 × 3"):
        load(f"{games}:Lamps", make={"render_mode": None})


def test_where_a_game_comes_from(games: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [
        "classic/tictactoe_v3",
        "classic.tictactoe_v3",
        "classic/tictactoe",
        "classic/tictactoe-v3",
    ]
    names.append("pettingzoo.classic.tictactoe_v3")
    assert {load(name).seats for name in names} == {("player_1", "player_2")}
    monkeypatch.syspath_prepend(str(games.parent))
    for name in ("zz_games:sums", "zz_games:zz/sums-v1", f"{games}:sums"):
        assert len(load(name).seats) == 3
    assert len(load("zz_games:sums", make={"agents": 5}).seats) == 5


@pytest.mark.parametrize("game", ["classic/tictactoe_v3", "classic/leduc_holdem_v4"])
def test_it_is_ready_to_train_on(game: str) -> None:
    assert check_env(load(game, max_turns=8)) == []


@pytest.mark.filterwarnings("ignore:The old environment creation API:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("classic/tictacto_v3", {}, "no such game. Did you mean 'classic/tictactoe-v3'"),
        ("tictactoe_v3", {}, "Did you mean 'classic/tictactoe-v3'"),
        ("classic/tictactoe_v1", {}, "Did you mean 'classic/tictactoe-v3'"),
        ("zz_none.game_v1", {}, "no module 'zz_none' is installed"),
        ("zz_none:Game", {}, "'zz_none' could not be imported"),
        ("json", {}, "no such game"),
        ("os.path", {}, "os.path has no env or parallel_env"),
        ("json:game", {}, "json has no game and registers no such game"),
        ("butterfly/pistonball_v6", {}, "pymunk|images of"),
        ("pettingzoo.test.example_envs.generated_agents_env_v0", {}, "does not know its agents"),
        ("classic/chess_v6", {"make": {"size": 9}}, "could not be made with env.args.make="),
        ("classic/tictactoe_v3", {"actions": ["a"]}, "has 1 names, and agent 'player_1'"),
        ("classic/tictactoe_v3", {"tries": 0}, "env.args.tries=0"),
        ("classic/tictactoe_v3", {"max_turns": 0}, "env.args.max_turns=0"),
        ("classic/tictactoe_v3", {"planes": [2]}, "have 2 planes"),
        ("classic/tictactoe_v3", {"plane": [2]}, "Did you mean 'planes'"),
    ],
)
def test_what_is_wrong_is_said(name: str, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as raised:
        load(name, **settings).tasks(0, 1)
    assert len(str(raised.value)) < 1600


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "multi_agent_ale_py", None)
    with pytest.raises(
        ConfigError, match=r"not installed here .*pip install 'pettingzoo\[atari\]'"
    ):
        load("atari/boxing_v2")
