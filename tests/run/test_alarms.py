"""Each alarm on made-up metrics: what it measures, and when it is out of bounds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest

from rayrl.config import AlarmConfig, AlarmsConfig, Config, from_dict, validate
from rayrl.errors import ConfigError
from rayrl.run.alarms import (
    START,
    Alarm,
    Rule,
    alarm_rules,
    deviation,
    relevant_rows,
    share_of_start,
    share_of_step,
)

CFG = AlarmsConfig()


def rule(name: str, **kwargs: Any) -> Rule:
    (found,) = [one for one in alarm_rules(CFG, **kwargs) if one.name == name]
    return found


def rewards(*values: float, std: float = 0.0) -> list[dict[str, float | None]]:
    return [{"reward": value, "reward_std": std, "episodes": 16.0} for value in values]


@pytest.mark.parametrize(
    ("name", "metrics", "value", "is_out"),
    [
        ("mismatch", {"mismatch/mean": 0.1}, 0.1, False),  # at the bound is within it
        ("mismatch", {"mismatch/mean": 0.11}, 0.11, True),
        ("entropy_floor", {"entropy": 0.01}, 0.01, False),
        ("entropy_floor", {"entropy": 0.009}, 0.009, True),
        ("kl", {"kl": 0.6, "approx_kl": 0.0}, 0.6, True),
        ("step_kl", {"kl": 0.6, "approx_kl": 0.0}, 0.0, False),
        ("zero_variance_groups", {"groups/zero_variance_share": 0.95}, 0.95, True),
        ("starvation", {"time/collect": 9.0, "time/total": 10.0}, 0.9, False),
        ("starvation", {"time/collect": 9.6, "time/total": 10.0}, 0.96, True),
        ("idle_replicas", {"time/idle": 6.0, "time/total": 10.0}, 0.6, True),
        ("idle_replicas", {"time/update": 9.0, "time/total": 10.0}, None, False),
    ],
)
def test_one_metric(
    name: str, metrics: Mapping[str, float], value: float | None, is_out: bool
) -> None:
    one = rule(name, kl_coef=0.01, max_lag=1)
    measured = one.measure([metrics])
    assert measured == (None if value is None else pytest.approx(value))
    assert one.is_out(measured) is is_out


def test_what_nobody_computes_or_is_so_by_design_raises_nothing() -> None:
    assert rule("kl", kl_coef=0).measure([{"kl": 9.0}]) is None
    taking_turns = [{"time/idle": 9.0, "time/total": 10.0}]
    assert rule("idle_replicas", max_lag=0).measure(taking_turns) is None
    assert rule("mismatch").measure([{"mismatch/mean": None}]) is None  # null in metrics.jsonl
    assert not rule("mismatch").is_out(None)


def test_what_is_not_a_number_is_out_of_bounds() -> None:
    assert rule("mismatch").is_out(math.nan)
    assert rule("entropy_floor").is_out(math.nan)
    assert rule("mismatch").is_out(math.inf)


def test_entropy_against_that_of_the_first_steps() -> None:
    measure = share_of_start("entropy")
    start: list[Any] = [{"entropy": value} for value in (2.0, 1.0, 1.5, None, 1.5)]  # mean 1.5
    assert measure(start) is None, "the first steps are what is compared with"
    assert measure([*start, {"entropy": 0.3}]) == pytest.approx(0.2)
    assert measure([*start, {"entropy": 0.3}, {"entropy": 0.12}]) == pytest.approx(0.08)
    assert measure([{"entropy": 0.0}] * 6) is None


def test_a_jump_is_counted_in_deviations_of_the_steps_before() -> None:
    measure = deviation(window=4, patience=1)
    # of the last four before the newest, 1 3 1 3, the mean is 2 and the deviation 1
    assert measure(rewards(9, 1, 3, 1, 3, 7)) == pytest.approx(5)
    assert measure(rewards(9, 1, 3, 1, 3, -3)) == pytest.approx(5)
    # its own standard error, 8 / sqrt(16) = 2, is larger
    assert measure(rewards(9, 1, 3, 1, 3, 7, std=8.0)) == pytest.approx(2.5)


def test_a_jump_needs_half_a_window() -> None:
    measure = deviation(window=4, patience=1)
    assert measure(rewards(1, 7)) is None
    assert measure(rewards(1, 3, 7)) == pytest.approx(5)
    assert deviation(window=2, patience=1)(rewards(1, 7)) is None, "one step has no spread"


def test_a_jump_that_stays_is_one_for_all_of_its_patience() -> None:
    """The steps that are counted are not among those they are compared with."""
    measure = deviation(window=4, patience=3)
    run = rewards(1, 3, 1, 3, 7, 7, 7)
    # compared with 1 3, 1 3 1 (mean 5/3, deviation √8/3) and 1 3 1 3
    found = [measure(run[:n]) for n in (5, 6, 7)]
    assert found == pytest.approx([5, 16 / math.sqrt(8), 5])
    # then the window reaches them, and what is new becomes what is usual
    assert measure(rewards(1, 3, 1, 3, 7, 7, 7, 7)) == pytest.approx((7 - 3.5) / math.sqrt(4.75))


def test_a_jump_from_rewards_that_never_differed() -> None:
    measure = deviation(window=4, patience=1)
    assert measure(rewards(0, 0, 0, 0)) == 0
    assert measure(rewards(0, 0, 0, 1)) == math.inf
    assert rule("reward_jump").is_out(math.inf)


def test_a_steady_climb_is_no_jump() -> None:
    """20 steps of a slope s: mean 10.5 s behind, deviation 5.766 s."""
    measure = deviation(window=20, patience=1)
    assert measure(rewards(*(k / 100 for k in range(21)))) == pytest.approx(10.5 / 5.766, rel=1e-3)


def test_a_share_of_no_time() -> None:
    assert share_of_step("time/collect")([{"time/collect": 0.0, "time/total": 0.0}]) is None


def test_only_what_an_alarm_may_look_at_is_kept() -> None:
    rows: list[Any] = [{"reward": k % 3, "entropy": 1 + k, "episodes": 16} for k in range(60)]
    kept = relevant_rows(rows, CFG)
    assert len(kept) == START + CFG.reward_window + CFG.reward_jump.patience
    for one in alarm_rules(CFG):
        assert one.measure(kept) == one.measure(rows)


def test_the_first_entropies_are_what_a_share_is_of() -> None:
    """Hard tasks have no entropy at first: nobody succeeds, so no row is computed."""
    rows: list[Any] = [{"reward": 0.0}] * 30
    rows += [{"reward": 0.5, "entropy": 1.0}, {"reward": 0.0}] * 5 + [{"reward": 0.5}] * 30
    one = rule("entropy_share")
    assert one.measure(rows) is None
    rows.append({"reward": 0.5, "entropy": 0.05})
    assert one.measure(rows) == pytest.approx(0.05)
    assert one.measure(relevant_rows(rows, CFG)) == pytest.approx(0.05)


def test_off_is_not_there() -> None:
    off = AlarmsConfig(mismatch=AlarmConfig(0.1, action="off"))
    assert "mismatch" not in [one.name for one in alarm_rules(off)]
    assert len(alarm_rules(off)) == len(alarm_rules(CFG)) - 1


def test_what_is_said() -> None:
    alarm = Alarm(rule("zero_variance_groups"), 6, 1.0)
    said = str(alarm)
    assert said.startswith(
        "alarm zero_variance_groups: the share of groups without any advantage is 1, above "
        "alarms.zero_variance_groups.threshold=0.9 for 3 steps. All siblings get the same reward"
    )
    assert "below alarms.entropy_floor.threshold=0.01" in str(Alarm(rule("entropy_floor"), 6, 0.0))
    assert alarm.to_json() == {
        "step": 6,
        "alarm": "zero_variance_groups",
        "value": 1.0,
        "threshold": 0.9,
        "patience": 3,
        "action": "log",
        "text": said,
    }
    assert Alarm(rule("mismatch"), 0, math.nan).to_json()["value"] is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mismatch": {"action": "halt"}}, r"alarms\.mismatch\.action=halt: must be one of off"),
        ({"kl": {"threshold": -1.0}}, r"alarms\.kl\.threshold=-1\.0: must be 0 or more"),
        ({"kl": {"patience": 0}}, r"alarms\.kl\.patience=0: must be 1 or more"),
        ({"starvation": {"threshold": 1.5}}, r"alarms\.starvation\.threshold=1\.5: must be from 0"),
        ({"reward_window": 1}, r"alarms\.reward_window=1: must be 2 or more"),
        ({"mismatch": {"treshold": 1.0}}, r"alarms\.mismatch\.treshold: .*threshold"),
    ],
)
def test_settings_that_cannot_be(settings: Mapping[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        validate(config(settings))


def test_one_setting_leaves_the_others() -> None:
    found = config({"mismatch": {"action": "stop"}}).alarms
    assert found.mismatch == AlarmConfig(0.1, 1, "stop")
    assert found.zero_variance_groups == CFG.zero_variance_groups


def config(alarms: Mapping[str, Any]) -> Config:
    return from_dict({"env": {"name": "tictactoe"}, "alarms": alarms})


def test_each_environment_of_a_mixture_has_its_own_alarms() -> None:
    rules = alarm_rules(CFG, components=("sums", "games"))
    labels = [one.label for one in rules]
    assert len(labels) == len(set(labels)) == len(alarm_rules(CFG)) + 2
    assert {"reward_jump/sums", "reward_jump/games", "zero_variance_groups/games"} <= {*labels}
    assert not {"reward_jump", "zero_variance_groups"} & {*labels}
    by_label = {one.label: one for one in rules}
    rows: list[dict[str, float | None]] = [
        {"reward": 0.0, "reward/sums": k % 2, "reward_std/sums": 0.0, "episodes/sums": 4.0}
        for k in range(CFG.reward_window)
    ]
    rows.append({"reward": 0.0, "reward/sums": 5.5, "groups/games/zero_variance_share": 0.95})
    assert by_label["reward_jump/sums"].measure(rows) == 10, "mean 0.5, deviation 0.5"
    assert by_label["reward_jump/games"].measure(rows) is None, "it had no group in these steps"
    share = by_label["zero_variance_groups/games"]
    assert share.measure(rows) == 0.95
    alarm = Alarm(share, 3, 0.95)
    assert "alarm zero_variance_groups/games: in games, the share of groups" in str(alarm)
    assert "above alarms.zero_variance_groups.threshold=0.9" in str(alarm)
    assert "env.mix.games.args" in str(alarm)
    assert alarm.to_json()["alarm"] == "zero_variance_groups/games"
