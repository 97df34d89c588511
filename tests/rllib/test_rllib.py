"""RLlib's policies as players, and rayrl's environments for RLlib; nothing here starts Ray."""

from __future__ import annotations

import asyncio
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from ray.rllib.algorithms.ppo.torch.default_ppo_torch_rl_module import DefaultPPOTorchRLModule
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModule
from ray.rllib.core.rl_module.rl_module import RLModule

import rayrl
from rayrl import ConfigError, EnvError, Episode, Message, ScriptedPlayer, play_episode, user
from rayrl.cluster.code_bundle import function_references, played_code
from rayrl.config import from_dict
from rayrl.rllib.masked import MaskedPPO
from rayrl.rollout.players import player_function

BOX = spaces.Box(0.0, 1.0, (18,), np.float32)
MASKED = spaces.Dict({"observations": BOX, "action_mask": spaces.Box(0.0, 1.0, (9,), np.float32)})
NINE = spaces.Discrete(9)


def new_module(
    kind: Any = MaskedPPO, seen: Any = MASKED, acts: Any = NINE, **model: Any
) -> RLModule:
    torch.manual_seed(7)
    config = DefaultModelConfig(**{"fcnet_hiddens": [8], **model})
    return kind(observation_space=seen, action_space=acts, model_config=config)


def saved(module: RLModule, folder: Path) -> Path:
    module.save_to_path(folder)
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """As `Algorithm.save_to_path` writes it, as far as a player reads it."""
    whole = MultiRLModule()
    whole.add_module("default_policy", new_module())
    whole.save_to_path(tmp_path / "trained" / "learner_group" / "learner" / "rl_module")
    return tmp_path / "trained"


def board(key: str) -> list[Message]:
    rows = [[str(k) if key[k] == "." else key[k] for k in range(n, n + 3)] for n in (0, 3, 6)]
    return [user("\n".join(" | ".join(row) for row in rows))]


def play(seed: int, env: str = "tictactoe_versus", **seats: str) -> Episode:
    game = rayrl.load_env(env)
    players = {
        seat: ScriptedPlayer(player_function(game, f"env.seats.{seat}", who))
        for seat, who in seats.items()
    }
    (task,) = game.tasks(seed, 1)
    episode = asyncio.run(play_episode(game, task, players, id="test", seed=seed))
    assert episode.failure is None, episode.failure
    return episode


def moves(episode: Episode) -> list[str]:
    return [turn.text for turn in episode.turns]


def test_a_policy_takes_any_seat_and_is_deterministic(checkpoint: Path) -> None:
    who = f"rllib:{checkpoint}"
    first = [moves(play(seed, x=who, o="player:random")) for seed in range(6)]
    assert first == [moves(play(seed, x=who, o="player:random")) for seed in range(6)]
    other = [moves(play(seed, x="player:random", o=who)) for seed in range(6)]
    assert first != other
    for seed in range(6):
        episode = play(seed, x=who, o=f"{who}@greedy")
        assert {name: s["invalid"] for name, s in episode.scores.items()} == {"x": 0.0, "o": 0.0}
    assert play(3, "tictactoe", agent=who).scores["agent"]["format"] == 1.0


def test_moves_follow_the_policy(checkpoint: Path) -> None:
    """Against the module's own distribution, which is that of the logits of legal moves."""
    env = rayrl.load_env("tictactoe")
    key = "X.O......"
    observed = [float(cell == mark) for mark in "XO" for cell in key]
    legal = [float(cell == ".") for cell in key]
    batch = {
        "observations": torch.tensor([observed]),
        "action_mask": torch.tensor([legal]),
    }
    module = new_module()
    logits = module.forward_inference({Columns.OBS: batch})[Columns.ACTION_DIST_INPUTS][0]
    wanted = torch.softmax(logits, -1)
    assert wanted[[0, 2]].tolist() == [0.0, 0.0]
    bare = new_module(DefaultPPOTorchRLModule, BOX)
    plain = bare.forward_inference({Columns.OBS: batch["observations"]})
    assert torch.equal(plain[Columns.ACTION_DIST_INPUTS][0][1], logits[1])
    function = player_function(env, "eval.player", f"rllib:{checkpoint}")
    rng = random.Random(1)
    n = 3000
    drawn = Counter(str(function(board(key), rng)) for _ in range(n))
    for cell in range(9):
        share = drawn[f"<think></think><move>{cell}</move>"] / n
        assert abs(share - float(wanted[cell])) < 4 * (0.25 / n) ** 0.5
    greedy = player_function(env, "eval.player", f"rllib:{checkpoint}@greedy")
    best = f"<think></think><move>{int(wanted.argmax())}</move>"
    assert {str(greedy(board(key), random.Random(seed))) for seed in range(20)} == {best}


def test_every_folder_down_to_the_module_will_do(checkpoint: Path, tmp_path: Path) -> None:
    modules = checkpoint / "learner_group" / "learner" / "rl_module"
    saved(new_module(), tmp_path / "alone")
    ways = [checkpoint, modules.parents[1], modules.parent, modules, modules / "default_policy"]
    played = [moves(play(1, x=f"rllib:{way}", o="player:random")) for way in ways]
    played.append(moves(play(1, x=f"rllib:{tmp_path / 'alone'}", o="player:random")))
    assert all(one == played[0] for one in played)


def test_a_policy_without_a_mask_plays_legal_moves_too(tmp_path: Path) -> None:
    path = saved(new_module(DefaultPPOTorchRLModule, BOX), tmp_path / "bare")
    episode = play(2, x=f"rllib:{path}", o=f"rllib:{path}@greedy")
    assert all(scores["invalid"] == 0.0 for scores in episode.scores.values())


def refused(who: str, env: str = "tictactoe") -> str:
    with pytest.raises(ConfigError) as raised:
        player_function(rayrl.load_env(env), "env.seats.o", who)
    assert str(raised.value).startswith(f"env.seats.o={who}: ")
    return str(raised.value)


def test_what_is_no_checkpoint_of_this_game(checkpoint: Path, tmp_path: Path) -> None:
    assert "Did you mean 'trained'" in refused(f"rllib:{tmp_path / 'traned'}")
    assert "no numeric view" in refused(f"rllib:{checkpoint}", "copyword")
    (tmp_path / "empty").mkdir()
    assert "no checkpoint of RLlib" in refused(f"rllib:{tmp_path / 'empty'}")
    (tmp_path / "tuned" / "checkpoint_000003").mkdir(parents=True)
    assert "checkpoint_000003." in refused(f"rllib:{tmp_path / 'tuned'}")
    (tmp_path / "old" / "policies").mkdir(parents=True)
    assert "old API stack" in refused(f"rllib:{tmp_path / 'old'}")


@pytest.mark.parametrize(
    ("kind", "seen", "acts", "model", "words"),
    [
        (DefaultPPOTorchRLModule, spaces.Box(0, 1, (4,)), NINE, {}, "gives the shape (18,)"),
        (DefaultPPOTorchRLModule, BOX, spaces.Discrete(4), {}, "has 9 actions"),
        (DefaultPPOTorchRLModule, BOX, spaces.Box(-1, 1, (9,)), {}, "has 9 actions"),
        (DefaultPPOTorchRLModule, BOX, NINE, {"use_lstm": True, "max_seq_len": 4}, "recurrent"),
    ],
)
def test_a_policy_of_another_shape(
    kind: Any, seen: Any, acts: Any, model: Any, words: str, tmp_path: Path
) -> None:
    path = saved(new_module(kind, seen, acts, **model), tmp_path / "other")
    assert words in refused(f"rllib:{path}")


def test_several_policies_are_told_apart(checkpoint: Path) -> None:
    modules = checkpoint / "learner_group" / "learner" / "rl_module"
    saved(new_module(), modules / "second")
    said = refused(f"rllib:{checkpoint}")
    assert str(modules / "default_policy") in said
    assert str(modules / "second") in said
    play(0, x=f"rllib:{modules / 'second'}", o="player:random")


def test_connectors_that_change_the_observation_are_refused(checkpoint: Path) -> None:
    pipeline = checkpoint / "env_runner" / "env_to_module_connector"
    for name in ("AddObservationsFromEpisodesToBatch", "NumpyToTensor"):
        (pipeline / name).mkdir(parents=True)
    play(0, x=f"rllib:{checkpoint}", o="player:random")
    (pipeline / "MeanStdFilter").mkdir()
    assert "connectors MeanStdFilter" in refused(f"rllib:{checkpoint}")


def test_a_damaged_checkpoint_is_named(checkpoint: Path) -> None:
    (file,) = checkpoint.rglob("default_policy/module_state*")
    file.write_bytes(b"nothing")
    assert "cannot be read" in refused(f"rllib:{checkpoint}")


def test_a_newer_checkpoint_in_the_same_place_is_read(tmp_path: Path) -> None:
    """The greedy move on an empty board, made cell 2 and then cell 6 by the last layer's bias."""
    said = []
    for cell in (2, 6):
        module = new_module()
        with torch.no_grad():
            module.pi.net.mlp[-1].bias[cell] += 100.0  # type: ignore[attr-defined]
        path = saved(module, tmp_path / "policy")
        player = player_function(rayrl.load_env("tictactoe"), "eval.player", f"rllib:{path}@greedy")
        said.append(player(board("........."), random.Random(0)))
    assert said == [f"<think></think><move>{cell}</move>" for cell in (2, 6)]


def test_without_rllib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rayrl.rllib.player", None)
    assert "pip install 'rayrl[rllib]'" in refused("rllib:runs/x")


def test_it_is_not_sent_as_code() -> None:
    config = from_dict(
        {"env": {"name": "tictactoe_versus", "seats": {"o": "rllib:runs/x", "x": "rivals.py:f"}}}
    )
    assert function_references(config) == {"rivals.py:f": "env.seats.x"}
    assert played_code(config) == ["tictactoe_versus", "rivals.py:f"]


def test_the_module_needs_a_mask() -> None:
    with pytest.raises(ConfigError, match="legal="):
        new_module(MaskedPPO, BOX)


def test_illegal_actions_have_no_probability_in_training_either() -> None:
    module = new_module()
    batch = {
        Columns.OBS: {
            "observations": torch.zeros(2, 18),
            "action_mask": torch.tensor([[1.0] + [0.0] * 8, [0.0] * 8 + [1.0]]),
        }
    }
    outputs = module.forward_train(batch)
    assert torch.softmax(outputs[Columns.ACTION_DIST_INPUTS], -1).argmax(-1).tolist() == [0, 8]
    assert torch.softmax(outputs[Columns.ACTION_DIST_INPUTS], -1).max(-1).values.tolist() == [1, 1]
    values = module.compute_values(batch, outputs[Columns.EMBEDDINGS])  # type: ignore[attr-defined]
    assert torch.equal(values, module.compute_values(batch))  # type: ignore[attr-defined]
    assert set(batch[Columns.OBS]) == {"observations", "action_mask"}


def test_all_seats_are_agents() -> None:
    env = rayrl.to_multi_agent("tictactoe_versus")
    assert env.possible_agents == ["x", "o"]
    assert env.get_observation_space("o") == MASKED
    finals: Counter[float] = Counter()
    rng = random.Random(0)
    for seed in range(20):
        seen, _ = env.reset(seed=seed)
        reward: dict[str, float] = {}
        over = False
        previous = ""
        while not over:
            (seat,) = seen
            assert seat != previous
            assert seen[seat] in MASKED
            mask = seen[seat]["action_mask"]
            action = rng.choice([k for k in range(9) if mask[k]])
            previous = seat
            seen, reward, terminated, truncated, _ = env.step({seat: action})
            over = terminated["__all__"]
            assert not truncated["__all__"]
        assert set(seen) == set(reward) == {"x", "o"}
        # each seat's format and no invalid move: 0.2 beside the result
        assert sorted(reward.values()) in ([0.2, 1.2], [0.7, 0.7])
        finals[max(reward.values())] += 1
    assert len(finals) == 2
    env.close()


def test_some_seats_are_agents() -> None:
    env = rayrl.to_multi_agent("tictactoe_versus", seats=["o"], opponents={"x": "random"})
    seen, infos = env.reset(seed=0)
    assert list(seen) == list(infos) == ["o"]
    with pytest.raises(EnvError, match="o is to reply"):
        env.step({"x": 1})
    env.close()
    with pytest.raises(ConfigError, match="no seat 'y'"):
        rayrl.to_multi_agent("tictactoe_versus", seats=["y"])
    with pytest.raises(ConfigError, match="say who plays it"):
        rayrl.to_multi_agent("tictactoe_versus", seats=["o"])


def test_how_tictactoe_is_seen() -> None:
    view = rayrl.load_env("tictactoe_versus").numeric
    assert view is not None
    assert view.observation(board("XO.......")).tolist() == [1.0, *[0.0] * 9, 1.0, *[0.0] * 7]
    assert view.mask(board("XO......X")).tolist() == [0.0, 0.0, *[1.0] * 6, 0.0]
