"""Rules of the alarms: pure functions of the metrics of a run's steps.

A rule measures one number at the newest step, some relative to earlier steps, and compares it with
a threshold. `monitor.py` applies patience, raises alarms and performs their actions.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rayrl.config import AlarmConfig, AlarmsConfig

__all__ = ["ALARMS", "START", "Alarm", "Rule", "alarm_rules", "relevant_rows"]

Row = Mapping[str, float | None]
Rows = Sequence[Row]
Measure = Callable[[Rows], float | None]

ALARMS = "alarms.jsonl"  # raised alarms, in the run's folder
START = 5  # steps whose mean entropy is the initial one
_LOWER_BOUNDS = ("entropy_floor", "entropy_share")


@dataclass(frozen=True, slots=True)
class Rule:
    """Rule of one alarm.

    Attributes:
        name: key within `alarms`.
        component: the environment of a mixture that it is about; empty: the whole run.
        setting: threshold, patience and action.
        measure: returns the number from the metrics of all steps so far; None: not measured yet.
        what: description of the number.
        remedy: likely cause of a violation and what to try.
        below: the threshold is a lower bound.
    """

    name: str
    setting: AlarmConfig
    measure: Measure
    what: str
    remedy: str
    below: bool = False
    component: str = ""

    @property
    def label(self) -> str:
        """Its name, and the component's: `reward_jump/sums`."""
        return f"{self.name}/{self.component}" if self.component else self.name

    def is_out(self, value: float | None) -> bool:
        """Tell whether `value` violates the threshold; NaN does, None does not."""
        if value is None:
            return False
        threshold = self.setting.threshold
        return not (value >= threshold if self.below else value <= threshold)


@dataclass(frozen=True, slots=True)
class Alarm:
    """A raised alarm.

    Attributes:
        step: last of the consecutive steps out of bounds.
        value: number measured at that step.
    """

    rule: Rule
    step: int
    value: float

    def __str__(self) -> str:
        rule = self.rule
        side = "below" if rule.below else "above"
        n = rule.setting.patience
        return (
            f"alarm {rule.label}: {rule.what} is {self.value:.3g}, {side} "
            f"alarms.{rule.name}.threshold={rule.setting.threshold:g}"
            f"{f' for {n} steps' if n > 1 else ''}. {rule.remedy}"
        )

    def to_json(self) -> dict[str, float | int | str | None]:
        """Return the alarm's line of alarms.jsonl."""
        setting = self.rule.setting
        return {
            "step": self.step,
            "alarm": self.rule.label,
            "value": self.value if math.isfinite(self.value) else None,
            "threshold": setting.threshold,
            "patience": setting.patience,
            "action": setting.action,
            "text": str(self),
        }


_DESCRIPTIONS = {
    "mismatch": (
        "the mean difference of the engine's and the learner's log-probabilities",
        (
            "The engine samples from another distribution than the learner assumes, so its "
            "gradients cannot be trusted. The learner ignores sampling.top_p and sampling.top_k: "
            "set them to 1 and 0. Weights older than the learner's count too: lower train.max_lag. "
            "Compare engine.dtype with learner.dtype. If none of these explains it, set "
            "cluster.check_pushes=1, which stops the run if replicas compute another model than "
            "was pushed to them."
        ),
    ),
    "entropy_floor": (
        "the policy's entropy",
        (
            "The policy is sure of every token, so that siblings no longer differ; lower "
            "learner.lr, raise sampling.temperature, or add algo.entropy_coef or algo.kl_coef."
        ),
    ),
    "entropy_share": (
        f"the policy's entropy, as a share of its mean in the first {START} steps,",
        (
            "The policy stops exploring; lower learner.lr, raise sampling.temperature, or add "
            "algo.entropy_coef or algo.kl_coef."
        ),
    ),
    "reward_jump": (
        "the mean reward's distance from that of the last {window} steps, in standard deviations,",
        (
            "If it rose, the policy may exploit the reward: read its best episodes. If it fell, "
            "the policy or the environment broke: read the worst, and lower learner.lr."
        ),
    ),
    "kl": (
        "the policy's divergence from the model it started from",
        "The policy may lose what it could do before; raise algo.kl_coef, or lower learner.lr.",
    ),
    "step_kl": (
        "the divergence of the updated policy from the one that sampled",
        (
            "The updates of one step are too large for its samples; lower learner.lr, algo.epochs "
            "or algo.minibatches."
        ),
    ),
    "zero_variance_groups": (
        "the share of groups without any advantage",
        (
            "All siblings get the same reward, so there is nothing to learn from. If it is low, "
            "the tasks are too hard; if it is high, too easy. Change env.args, or raise "
            "train.group_size or sampling.temperature."
        ),
    ),
    "starvation": (
        "the share of the step that the learner waited for episodes",
        (
            "Rollouts are the bottleneck: add cluster.replicas; if workers/waiting_groups is not "
            "0, raise cluster.env_workers, cluster.env_workers_max or cluster.concurrency; or look "
            "for episodes that take much longer than the others."
        ),
    ),
    "idle_replicas": (
        "the share of the step that replicas were idle",
        (
            "The learner is the bottleneck: give it more resources (learner.world_size, "
            "learner.micro_batch_tokens), use fewer replicas, or raise train.max_lag."
        ),
    ),
}
"""What each alarm measures, and what to do about it."""


def alarm_rules(
    cfg: AlarmsConfig, *, kl_coef: float = 0.0, max_lag: int = 0, components: Sequence[str] = ()
) -> list[Rule]:
    """Return the rules of all alarms that are on.

    Args:
        components: of a mixture; each has rules of its own for rewards and for groups without
            advantage, instead of those of the whole.
        kl_coef: `algo.kl_coef`; at 0 the reference is not computed.
        max_lag: `train.max_lag`; at 0 rollouts and updates alternate, so replicas are idle during
            every update by design.
    """
    settings = {
        "mismatch": (cfg.mismatch, latest("mismatch/mean")),
        "entropy_floor": (cfg.entropy_floor, latest("entropy")),
        "entropy_share": (cfg.entropy_share, share_of_start("entropy")),
        "kl": (cfg.kl, latest("kl") if kl_coef > 0 else unmeasured),
        "step_kl": (cfg.step_kl, latest("approx_kl")),
        "starvation": (cfg.starvation, share_of_step("time/collect")),
        "idle_replicas": (
            cfg.idle_replicas,
            share_of_step("time/idle") if max_lag > 0 else unmeasured,
        ),
    }
    rules = [_rule(name, *of_rule, cfg) for name, of_rule in settings.items()]
    for component in components or ("",):
        jump = deviation(cfg.reward_window, cfg.reward_jump.patience, component)
        rules.append(_rule("reward_jump", cfg.reward_jump, jump, cfg, component))
        share = f"groups/{component}/zero_variance_share".replace("//", "/")
        rules.append(
            _rule("zero_variance_groups", cfg.zero_variance_groups, latest(share), cfg, component)
        )
    return [rule for rule in rules if rule.setting.action != "off"]


def _rule(
    name: str, setting: AlarmConfig, measure: Measure, cfg: AlarmsConfig, component: str = ""
) -> Rule:
    what, remedy = _DESCRIPTIONS[name]
    what = what.format(window=cfg.reward_window)
    if component:
        what = f"in {component}, {what}"
        remedy = remedy.replace("env.args", f"env.mix.{component}.args")
    return Rule(name, setting, measure, what, remedy, name in _LOWER_BOUNDS, component)


def relevant_rows(rows: list[Row], cfg: AlarmsConfig) -> list[Row]:
    """Return the steps that rules may read: the first ones with an entropy, and the last ones."""
    last = cfg.reward_window + cfg.reward_jump.patience
    first = [row for row in rows[:-last] if "entropy" in row]
    return first[:START] + rows[-last:]


def unmeasured(rows: Rows) -> float | None:
    """Measure nothing."""
    return None


def latest(name: str) -> Measure:
    """Measure a metric of the newest step."""
    return lambda rows: rows[-1].get(name)


def share_of_step(name: str) -> Measure:
    """Measure seconds of the newest step as a share of its total."""

    def measure(rows: Rows) -> float | None:
        spent, total = rows[-1].get(name), rows[-1].get("time/total")
        return None if spent is None or not total else spent / total

    return measure


def share_of_start(name: str) -> Measure:
    """Measure a metric relative to its mean over the first `START` steps that have it."""

    def measure(rows: Rows) -> float | None:
        values = [row[name] for row in rows if name in row]
        first = [value for value in values[:START] if value is not None]
        now = rows[-1].get(name)
        if len(values) <= START or now is None or not sum(first) > 0:
            return None
        return now / statistics.fmean(first)

    return measure


def deviation(window: int, patience: int, component: str = "") -> Measure:
    """Measure the distance of the newest mean reward from earlier ones in standard deviations.

    It is compared with the `window` steps that end `patience` steps ago, so that steps already out
    of bounds are never part of the comparison. The standard deviation is theirs, but at least the
    standard error of the newest mean.

    Args:
        component: of a mixture, whose rewards these are; steps without any are skipped.
    """
    of = f"/{component}" if component else ""

    def measure(rows: Rows) -> float | None:
        now = rows[-1]
        before = rows[:-patience][-window:]
        past = [value for row in before if (value := row.get(f"reward{of}")) is not None]
        reward, n = now.get(f"reward{of}"), now.get(f"episodes{of}")
        if len(past) < max(2, window // 2) or reward is None:
            return None
        error = (now.get(f"reward_std{of}") or 0.0) / math.sqrt(n or 1.0)
        spread = max(statistics.pstdev(past), error)
        distance = abs(reward - statistics.fmean(past))
        return distance / spread if spread > 0 else math.inf if distance > 0 else 0.0

    return measure
