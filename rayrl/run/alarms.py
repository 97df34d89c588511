"""When a training run is out of bounds: pure functions of the figures of its steps.

Each alarm measures one number of the newest step, some against steps before it, and compares it
with a bound. `monitor.py` counts for how long, says so, and does what the setting asks for.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rayrl.config import AlarmConfig, AlarmsConfig

__all__ = ["ALARMS", "START", "Alarm", "Rule", "needed", "rules"]

Row = Mapping[str, float | None]
Rows = Sequence[Row]
Measure = Callable[[Rows], float | None]

ALARMS = "alarms.jsonl"  # in a run's folder: those that were raised
START = 5  # first steps of a run that measured the entropy: their mean is what it began with


@dataclass(frozen=True, slots=True)
class Rule:
    """One alarm.

    Attributes:
        name: of its setting in `alarms`.
        setting: threshold, patience, action.
        measure: the number, of all steps so far; None while there is nothing to compare with.
        what: the number in words.
        remedy: what it usually means that it is out of bounds, and what to try.
        below: whether the threshold is a lower bound.
    """

    name: str
    setting: AlarmConfig
    measure: Measure
    what: str
    remedy: str
    below: bool = False

    def is_out(self, value: float | None) -> bool:
        """Whether a number is out of bounds; one that is not a number is."""
        if value is None:
            return False
        threshold = self.setting.threshold
        return not (value >= threshold if self.below else value <= threshold)


@dataclass(frozen=True, slots=True)
class Alarm:
    """An alarm that was raised.

    Attributes:
        step: the last of the steps in a row that were out of bounds.
        value: what was measured there.
    """

    rule: Rule
    step: int
    value: float

    def __str__(self) -> str:
        rule = self.rule
        side = "below" if rule.below else "above"
        n = rule.setting.patience
        return (
            f"alarm {rule.name}: {rule.what} is {self.value:.3g}, {side} "
            f"alarms.{rule.name}.threshold={rule.setting.threshold:g}"
            f"{f' for {n} steps' if n > 1 else ''}. {rule.remedy}"
        )

    def to_json(self) -> dict[str, float | int | str | None]:
        """A line of alarms.jsonl."""
        setting = self.rule.setting
        return {
            "step": self.step,
            "alarm": self.rule.name,
            "value": self.value if math.isfinite(self.value) else None,
            "threshold": setting.threshold,
            "patience": setting.patience,
            "action": setting.action,
            "text": str(self),
        }


def rules(cfg: AlarmsConfig, *, kl_coef: float = 0.0, max_lag: int = 0) -> list[Rule]:
    """The alarms that are on.

    Args:
        kl_coef: `algo.kl_coef`; without it nobody computes the reference.
        max_lag: `train.max_lag`; at 0 players and learner take turns, so that replicas are idle in
            every update by design.
    """
    found = [
        Rule(
            "mismatch",
            cfg.mismatch,
            latest("mismatch/mean"),
            "the mean difference of the engine's and the learner's log-probabilities",
            "What was sampled from is not what the learner assumes, so what is learned cannot be "
            "trusted. The learner takes no account of sampling.top_p and sampling.top_k: set them "
            "to 1 and 0. Weights older than the learner's count too: lower train.max_lag. Compare "
            "engine.dtype with learner.dtype. If none of these explains it, set "
            "cluster.check_pushes=1, which stops the run where replicas compute another model than "
            "was pushed to them.",
        ),
        Rule(
            "entropy_floor",
            cfg.entropy_floor,
            latest("entropy"),
            "the policy's entropy",
            "It is sure of every token, so that siblings no longer differ; lower learner.lr, raise "
            "sampling.temperature, or add algo.entropy_coef or algo.kl_coef.",
            below=True,
        ),
        Rule(
            "entropy_share",
            cfg.entropy_share,
            share_of_start("entropy"),
            f"the policy's entropy, as a share of its mean in the first {START} steps,",
            "The policy stops exploring; lower learner.lr, raise sampling.temperature, or add "
            "algo.entropy_coef or algo.kl_coef.",
            below=True,
        ),
        Rule(
            "reward_jump",
            cfg.reward_jump,
            jump(cfg.reward_window, cfg.reward_jump.patience),
            f"the mean reward's distance from that of the last {cfg.reward_window} steps, in "
            "standard deviations,",
            "Up, the policy may have found a way around the task: read its best episodes. Down, it "
            "broke or the environment did: read the worst, and lower learner.lr.",
        ),
        Rule(
            "kl",
            cfg.kl,
            latest("kl") if kl_coef > 0 else nothing,
            "the policy's divergence from the model it started from",
            "It may forget what it could before; raise algo.kl_coef, or lower learner.lr.",
        ),
        Rule(
            "step_kl",
            cfg.step_kl,
            latest("approx_kl"),
            "the divergence of the updated policy from the one that played",
            "The updates of one step go too far for the samples they rest on; lower learner.lr, "
            "algo.epochs or algo.minibatches.",
        ),
        Rule(
            "zero_variance_groups",
            cfg.zero_variance_groups,
            latest("groups/zero_variance_share"),
            "the share of groups without any advantage",
            "All siblings get the same reward, so there is nothing to learn from. Where it is low, "
            "the tasks are too hard; where it is high, too easy. Change env.args, or raise "
            "train.group_size or sampling.temperature.",
        ),
        Rule(
            "starvation",
            cfg.starvation,
            share_of_step("time/collect"),
            "the share of the step that the learner waited for episodes",
            "Rollouts are the bottleneck: add cluster.replicas; where workers/waiting_groups is "
            "not 0 raise cluster.env_workers, cluster.env_workers_max or cluster.concurrency; or "
            "look for episodes that take much longer than the others.",
        ),
        Rule(
            "idle_replicas",
            cfg.idle_replicas,
            share_of_step("time/idle") if max_lag > 0 else nothing,
            "the share of the step that replicas had nothing to do",
            "The learner is what takes the time; give it more (learner.world_size, "
            "learner.micro_batch_tokens), or need fewer replicas; train.max_lag may be raised.",
        ),
    ]
    return [rule for rule in found if rule.setting.action != "off"]


def needed(rows: list[Row], cfg: AlarmsConfig) -> list[Row]:
    """Those of a run's steps that an alarm may look at: the first with an entropy, and the last."""
    last = cfg.reward_window + cfg.reward_jump.patience
    first = [row for row in rows[:-last] if "entropy" in row]
    return first[:START] + rows[-last:]


def nothing(rows: Rows) -> float | None:
    """Measures nothing."""
    return None


def latest(name: str) -> Measure:
    """A figure of the newest step."""
    return lambda rows: rows[-1].get(name)


def share_of_step(name: str) -> Measure:
    """Seconds of the newest step as a share of all of it."""

    def measure(rows: Rows) -> float | None:
        spent, total = rows[-1].get(name), rows[-1].get("time/total")
        return None if spent is None or not total else spent / total

    return measure


def share_of_start(name: str) -> Measure:
    """A figure of the newest step as a share of its mean over the first `START` that have it."""

    def measure(rows: Rows) -> float | None:
        known = [row[name] for row in rows if name in row]
        first = [value for value in known[:START] if value is not None]
        now = rows[-1].get(name)
        if len(known) <= START or now is None or not sum(first) > 0:
            return None
        return now / statistics.fmean(first)

    return measure


def jump(window: int, patience: int) -> Measure:
    """How far the newest mean reward is from those before, in standard deviations.

    The steps before are the `window` ones that ended `patience` steps ago, so that steps which are
    counted as out of bounds are never what the next one is compared with. The deviation is theirs,
    but not less than the standard error that the newest mean has by itself.
    """

    def measure(rows: Rows) -> float | None:
        now = rows[-1]
        before = rows[:-patience][-window:]
        past = [value for row in before if (value := row.get("reward")) is not None]
        reward, n = now.get("reward"), now.get("episodes")
        if len(past) < max(2, window // 2) or reward is None:
            return None
        error = (now.get("reward_std") or 0.0) / math.sqrt(n or 1.0)
        spread = max(statistics.pstdev(past), error)
        off = abs(reward - statistics.fmean(past))
        return off / spread if spread > 0 else math.inf if off > 0 else 0.0

    return measure
