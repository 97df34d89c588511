from __future__ import annotations

import pytest

from rayrl.config.stop_rule import NoProgress, StopRule, parse_stop_rule
from rayrl.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("eval/win >= 0.97 for 2", StopRule("eval/win", ">=", 0.97, 2)),
        ("  eval/first/x.win>.5  ", StopRule("eval/first/x.win", ">", 0.5)),
        ("eval/lose <= 1e-2", StopRule("eval/lose", "<=", 0.01)),
        ("eval/win/pass@4 < -3 for 10", StopRule("eval/win/pass@4", "<", -3.0, 10)),
        ("eval/win not improved for 3", NoProgress("eval/win", 3)),
        (" eval/x.win  not  improved  for  1 ", NoProgress("eval/x.win", 1)),
        ("", None),
    ],
)
def test_a_rule_is_read(text: str, rule: StopRule | NoProgress | None) -> None:
    assert parse_stop_rule("train.stop_when", text) == rule


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("eval/win", "write METRIC >= NUMBER"),
        (" ", "write METRIC"),
        ("win", "write METRIC .*: \"train.stop_when='eval/reward >= 0.9 for 2'\""),
        ("win not improved for 3", "'win' is no metric of an evaluation.* Did you mean 'eval/win'"),
        ("eval/win not improve for 3", "'improve' is not understood. Did you mean 'improved'"),
        ("eval/win not improved fro 3", "'fro' is not understood. Did you mean 'for'"),
        ("eval/win not improved for 0", "'0' is no number of evaluations"),
        ("eval/win not improved", "write METRIC"),
        ("eval/win 0.97", "write METRIC"),
        ("win >= 0.97", "'win' is no metric of an evaluation: eval/….* Did you mean 'eval/win'"),
        ("evla/win >= 1", "Did you mean 'eval/win'"),
        ("eval/win => 0.97", "'=>' is none of >=, <=, >, <. Did you mean '>='"),
        ("eval/win == 1", "'==' is none of"),
        ("eval/win >= much", "'much' is no number"),
        ("eval/win >= nan", "'nan' is no number"),
        ("eval/win >= 0.97 fro 2", "'fro' is not understood. Did you mean 'for'"),
        ("eval/win >= 0.97 for two", "'two' is no number of evaluations"),
        ("eval/win >= 0.97 for 0", "'0' is no number of evaluations"),
        ("eval/win >= 0.97 for", "Write METRIC"),
    ],
)
def test_a_wrong_rule_names_the_word_and_the_nearest(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=rf"^train\.stop_when={text}: .*{why}"):
        parse_stop_rule("train.stop_when", text)


@pytest.mark.parametrize(
    ("values", "met"),
    [
        ([], False),
        ([0.98], False),  # twice, says the rule
        ([0.98, 0.97], True),
        ([0.98, 0.96, 0.99], False),
        ([0.1, 0.99, 0.98], True),
        ([0.98, None, 0.98], False),
        ([None, None], False),
    ],
)
def test_the_last_evaluations_must_meet_it(values: list[float | None], met: bool) -> None:
    assert StopRule("eval/win", ">=", 0.97, times=2).is_met(values) is met
