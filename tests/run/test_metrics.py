"""Metrics of a step on the screen, and its timeline."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rayrl.cluster.rollouts import CollectedGroups
from rayrl.config import AlgoConfig
from rayrl.environment.registry import load_env
from rayrl.learner.advantage import advantages
from rayrl.learner.batch import make_batch
from rayrl.rollout.rollout import play_group
from rayrl.run.metrics import (
    Clock,
    _turn_metrics,
    active_counts,
    headline,
    latest_steps,
    step_metrics,
    timeline_row,
)
from rayrl.types import Episode, Group, Message, Task, Turn, VersionSpan, assistant, user
from tests.act import instant

METRICS = {
    "reward": -0.0004,
    "reward_std": 0.25,
    "score/win": 0.75,
    "score/invalid": -0.0006,
    "score/talk": -0.5,
    "entropy": 0.1234,
    "grad_norm": 1.5,
    "time/collect": 2.04,
    "time/update": 1.96,
}


def test_the_headline_rounds_and_has_no_negative_zero() -> None:
    assert headline(METRICS) == {
        "reward": "0.000 ±0.25",
        "win": "0.75",
        "invalid": "0.00",
        "talk": "-0.50",
        "entropy": "0.123",
        "grad": "1.50",
        "play": "2.0 s",
        "learn": "2.0 s",
    }


def test_the_headline_shows_a_dash_for_unmeasured_metrics() -> None:
    known = {k: v for k, v in METRICS.items() if k not in ("entropy", "grad_norm")}
    assert (headline(known)["entropy"], headline(known)["grad"]) == ("–", "–")


def test_active_counts() -> None:
    """Four intervals of 2.5 s: one span covers all of them, the other from 5 to 6 s."""
    counts = active_counts([(100.0, 110.0), (105.0, 106.0)], bins=4)
    assert counts == {"began": 100.0, "width": 2.5, "mean": [1.0, 1.0, 1.4, 1.0]}


def test_spans_that_cover_parts_of_intervals() -> None:
    counts = active_counts([(0.0, 4.0), (0.5, 2.25)], bins=4)
    assert counts["mean"] == [1.5, 2.0, 1.25, 1.0]


def test_no_spans_and_an_empty_span() -> None:
    assert active_counts([]) == {}
    counts = active_counts([(7.0, 7.0)], bins=2)
    assert counts["mean"] == [0.0, 0.0]
    assert counts["width"] > 0


def test_the_area_is_the_total_time_of_the_spans() -> None:
    spans = [(0.1 * k, 0.1 * k + 0.37 * (k % 5)) for k in range(40)]
    counts = active_counts(spans)
    spent = sum(ended - began for began, ended in spans)
    assert sum(counts["mean"]) * counts["width"] == pytest.approx(spent, rel=0.01)  # it is rounded


def episode(number: int, began: float, seconds: float, *asked: tuple[float, float]) -> Episode:
    turns = tuple(Turn("agent", (), "x", "stop", began=at, seconds=s) for at, s in asked)
    return Episode(f"0/{number}", "e", Task(), number, turns, began=began, seconds=seconds)


def test_a_timeline_row_has_stages_episodes_and_requests() -> None:
    scripted = Turn("other", (), "x", "stop")  # nobody asked an engine
    first = episode(0, 1000.0, 4.0, (1001.0, 1.0))
    first = replace(first, turns=(*first.turns, scripted))
    never = Episode("0/2", "e", Task(), 2, ())  # its env worker died with it
    group = Group("0", Task(), (first, episode(1, 1002.0, 2.0, (1002.0, 2.0)), never))
    line = timeline_row(3, [("collect", 1000.0, 1004.25)], [group])
    assert line["step"] == 3
    assert line["stages"] == [["collect", 1000.0, 1004.25]]
    assert (line["episodes"]["began"], line["requests"]["began"]) == (1000.0, 1001.0)
    assert max(line["episodes"]["mean"]) == 2
    assert sum(line["requests"]["mean"]) * line["requests"]["width"] == pytest.approx(3.0)


def test_overlapping_steps_share_one_axis() -> None:
    """Step 1 was played while step 0 was learned."""
    lines = [
        timeline_row(0, [("update", 50.0, 60.0)], [Group("0", Task(), (episode(0, 40.0, 9.0),))]),
        timeline_row(1, [("update", 61.0, 70.0)], [Group("1", Task(), (episode(0, 52.0, 7.0),))]),
    ]
    first, second = latest_steps(lines)
    assert first["stages"] == [["update", 0.0, 10.0]]
    assert second["stages"] == [["update", 11.0, 20.0]]
    assert (first["episodes"]["began"], second["episodes"]["began"]) == (-10.0, 2.0)
    assert first["requests"] == {}
    assert latest_steps([]) == []


def test_the_clock_records_when_a_stage_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter((100.0, 101.0, 103.0, 104.0, 104.5, 105.0))
    monkeypatch.setattr("rayrl.run.metrics.time.perf_counter", lambda: next(times))
    monkeypatch.setattr("rayrl.run.metrics.time.time", lambda: 1_000_100.0)
    clock = Clock()
    for _ in range(2):
        with clock("push"):
            pass
    assert clock.spans == [("push", 1_000_101.0, 1_000_103.0), ("push", 1_000_104.0, 1_000_104.5)]
    assert clock.metrics() == {"time/push": 2.5, "time/total": 5.0}


async def test_episodes_and_turns_record_when_they_began() -> None:
    env = load_env("copyword")
    (task,) = env.tasks(0, 1)
    group = await play_group(env, task, instant(), id="0", size=2)
    for episode in group.episodes:
        assert 0 < episode.began <= episode.turns[0].began
        assert episode.turns[0].seconds > 0
    assert timeline_row(0, [], [group])["requests"]["began"] >= group.episodes[0].began - 0.001


def turn(seat: str, tokens: int) -> Turn:
    spans = (VersionSpan(0, 0, tokens),)
    return Turn(seat, (), "x", "stop", 0, (7,), (1,) * tokens, (0.0,) * tokens, spans)


def played_by(env: str, rewards: list[float], seat: str = "agent") -> Group:
    episodes = tuple(
        Episode(
            f"{env}/{k}",
            env,
            Task(),
            k,
            (turn(seat, k + 1),),
            {seat: {"right": reward}},
            {seat: reward},
        )
        for k, reward in enumerate(rewards)
    )
    return Group(env, Task(), episodes, (seat,))


def test_a_mixture_has_metrics_of_each_environment() -> None:
    """sums: rewards 0 1 | 1 1; games: 4 0 in seat x; rest: a group that was dropped."""
    groups = (
        played_by("sums", [0, 1]),
        played_by("sums", [1, 1]),
        played_by("games", [4, 0], "x"),
    )
    played = CollectedGroups(groups, dropped=(played_by("rest", [0]),))
    batch = make_batch(groups, advantages(groups, AlgoConfig()))
    names = ("sums", "games", "rest")
    found = step_metrics(0, played, batch, {}, Clock(), names)
    assert found["reward"] == pytest.approx(7 / 6)
    assert (found["reward/sums"], found["reward/games"]) == (0.75, 2.0)
    assert found["reward_std/games"] == 2.0
    assert (found["score/sums/right"], found["score/games/right"]) == (0.75, 2.0)
    assert "score/right" not in found, "of different environments, nobody can compare it"
    assert (found["episodes/sums"], found["episodes/games"], found["episodes/rest"]) == (4, 2, 0)
    assert (found["tokens/sums"], found["tokens/games"]) == (1 + 2 + 1 + 2, 3)
    assert (found["turns/sums"], found["reply_tokens/games"]) == (1, 1.5)
    shares = [found[f"groups/{name}/zero_variance_share"] for name in ("sums", "games")]
    assert shares == [0.5, 0.0]
    dropped = [found[f"groups/{name}/dropped"] for name in names]
    assert dropped == [0, 0, 1]
    assert "reward/rest" not in found
    alone = step_metrics(0, played, batch, {}, Clock())
    assert not [name for name in alone if "sums" in name]
    assert alone["score/right"] == pytest.approx(7 / 6)


def test_branches_and_what_programs_repeat_otherwise() -> None:
    def turn(name: str, *prompt: Message, offset: int = 0) -> Turn:
        ids = (1,) * len(prompt)
        return Turn("agent", prompt, "", "stop", offset, ids, (2,), (-1.0,), conversation=name)

    said = [user("a"), assistant("b"), user("c")]
    turns = turn("/a", *said[:1]), turn("/a", said[2], offset=2), turn("/b", *said)
    episodes = [
        Episode(f"g/{k}", "e", Task(), k, own, rewards={"agent": 1.0})
        for k, own in enumerate((turns, turns[:2]))
    ]
    found = _turn_metrics([Group("g", Task(), tuple(episodes))])
    assert (found["turns"], found["branches"], found["reprompted_tokens"]) == (2.5, 1.5, 1.5)
    examples = turn("/a", *said), turn("/b", *said[:2], user("d"))
    shown = Episode("g/0", "e", Task(), 0, examples, rewards={"agent": 1.0})
    found = _turn_metrics([Group("g", Task(), (shown,))])
    assert found["reprompted_tokens"] == 0.0, "the program's own examples"
    plain = Episode("g/0", "e", Task(), 0, (turn("", *said),), rewards={"agent": 1.0})
    assert "branches" not in _turn_metrics([Group("g", Task(), (plain,))])
