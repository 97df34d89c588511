"""Losses against numbers worked by hand, a float64 loop, and finite differences."""

import math
import sys
from dataclasses import replace

import pytest
import torch

from rayrl.config import AlgoConfig
from rayrl.config.validate import _CHOICES
from rayrl.errors import ConfigError
from rayrl.learner.advantage import ADVANTAGES
from rayrl.learner.batch import Totals
from rayrl.learner.loss import (
    LOSSES,
    SFT,
    LossInputs,
    LossOutputs,
    Objective,
    cispo,
    clipped,
    gspo,
    kl,
    objective_loss,
    resolve_loss,
    tis_weights,
    token_weights,
)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def tokens_of(logprobs, old, advantages, row=None, **algo):
    """Inputs of one row, or of those in `row`."""
    row = torch.zeros(len(logprobs), dtype=torch.int64) if row is None else torch.tensor(row)
    n_rows = int(row.max()) + 1
    return LossInputs(logprobs, old, old, advantages, row, n_rows, AlgoConfig(**algo))


def test_clip_by_hand():
    # r: 1.5 1.5 0.5 0.5 1.1; A: + - + - +; clip [0.8, 1.28].
    ratio = f64(1.5, 1.5, 0.5, 0.5, 1.1).requires_grad_()
    loss, cut = clipped(ratio, f64(1, -1, 1, -1, 2), 0.2, 0.28)
    assert loss.tolist() == pytest.approx([-1.28, 1.5, -0.5, 0.8, -2.2])
    assert cut.tolist() == [True, False, False, True, False]
    loss.sum().backward()
    assert ratio.grad.tolist() == pytest.approx([0, 1, -1, 0, -2])  # cut tokens have no gradient


def test_cispo_by_hand():
    # r = 2 with bound 1.5: the weight is cut, the gradient stays −1.5·A.
    old = f64(-2.0, -1.0)
    logprobs = (old + f64(math.log(2), math.log(0.5))).requires_grad_()
    out = cispo(tokens_of(logprobs, old, f64(3, 1), cispo_max=1.5))
    loss, cut = out.loss, out.metrics["clip_fraction"]
    assert loss.tolist() == pytest.approx(
        [-1.5 * 3 * (-2 + math.log(2)), -0.5 * (-1 + math.log(0.5))]
    )
    assert cut.tolist() == [True, False]
    loss.sum().backward()
    assert logprobs.grad.tolist() == pytest.approx([-4.5, -0.5])


def test_gspo_by_hand():
    # Row 0: log ratios 0.1 and 0.3, s = e^0.2 (inside); row 1: 0.5, s = e^0.5 (cut, A > 0).
    logprobs = f64(0.1, 0.5, 0.3).requires_grad_()
    out = gspo(
        tokens_of(logprobs, f64(0, 0, 0), f64(2, 1, 2), [0, 1, 0], clip_low=0.25, clip_high=0.25)
    )
    loss, cut = out.loss, out.metrics["clip_fraction"]
    s = math.exp(0.2)
    assert loss.tolist() == pytest.approx([-2 * s, -1.25, -2 * s])
    assert cut.tolist() == [False, True, False]
    loss.sum().backward()
    assert logprobs.grad.tolist() == pytest.approx([-2 * s, 0, -2 * s])


def test_gspo_gradient_is_that_of_the_sequence_ratio():
    # Averaged within rows, token form (eq. 17) = sequence form (eq. 5), whose s is differentiable.
    torch.manual_seed(0)
    row = torch.tensor([0, 0, 0, 1, 1])
    old, adv = torch.randn(5).double(), f64(1, 1, 1, -1, -1)
    a = (old + 0.1 * torch.randn(5)).requires_grad_()
    b = a.detach().clone().requires_grad_()
    loss = gspo(tokens_of(a, old, adv, [0, 0, 0, 1, 1], clip_low=0.2, clip_high=0.2)).loss
    weights = token_weights("sequence", row, 2, Totals(5, 2), 1)
    (loss * weights).sum().backward()
    direct = 0.0
    for i, sign in enumerate((1, -1)):
        s = (b - old)[row == i].mean().exp()
        direct = direct - torch.minimum(s * sign, s.clamp(0.8, 1.2) * sign) / 2
    direct.backward()
    assert (loss * weights).sum().item() == pytest.approx(direct.item())
    assert torch.allclose(a.grad, b.grad)


def test_kl_estimators_by_hand():
    logprobs, reference = f64(-1.0, -2.0), f64(-1.5, -1.0)
    assert kl(logprobs, reference, "k1").tolist() == [0.5, -1.0]
    assert kl(logprobs, reference, "k2").tolist() == [0.125, 0.5]
    assert kl(logprobs, reference, "k3").tolist() == pytest.approx(
        [math.exp(-0.5) - 0.5, math.e - 2]
    )


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_estimators_are_unbiased(estimator):
    p, q = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.3, 0.3, 0.4]).double()
    exact = (p * (p / q).log()).sum()
    assert (p * kl(p.log(), q.log(), estimator)).sum().item() == pytest.approx(exact.item())


def test_k2_has_the_gradient_of_the_kl():
    z = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([0.3, 0.3, 0.4]).double().log()
    p = z.log_softmax(0)
    (want,) = torch.autograd.grad((p.exp() * (p - q)).sum(), z, retain_graph=True)
    (got,) = torch.autograd.grad((p.exp().detach() * kl(p, q, "k2")).sum(), z)
    assert torch.allclose(want, got)


def test_tis_truncates_above_only():
    got = tis_weights(f64(-1.0, -1.0, -1.0), f64(-2.0, -1.0, 0.0), 2.0)
    assert got.tolist() == pytest.approx([2.0, 1.0, math.exp(-1)])


def test_aggregations_by_hand():
    # Rows of 1 and 3 loss tokens, of a batch of 8 tokens and 4 rows.
    row, totals = torch.tensor([0, 1, 1, 1]), Totals(8, 4)
    assert token_weights("token", row, 2, totals, 1).tolist() == [1 / 8] * 4
    expect = [1 / 4, 1 / 12, 1 / 12, 1 / 12]
    assert token_weights("sequence", row, 2, totals, 1).tolist() == pytest.approx(expect)
    assert token_weights("constant", row, 2, totals, 10).tolist() == [1 / 40] * 4


ROW = torch.tensor([0, 0, 1, 2, 2, 2])


def objective(loss="grpo", aggregation="token", constant=1.0, **algo):
    plain = {"clip_high": 0.2, "tis_max": 0.0, **algo}
    return Objective.of(AlgoConfig(loss=loss, aggregation=aggregation, **plain), constant)


def tokens(o, proximal=None, reference=None):
    """Six tokens of three rows, as the learner gives them to the loss of `o`."""
    g = torch.Generator().manual_seed(3)
    rollout = -torch.rand(6, generator=g).double() * 3
    logprobs = rollout + 0.2 * torch.randn(6, generator=g).double()
    old = rollout
    if o.algo.tis_max > 0:
        old = logprobs if proximal is None else proximal
    return LossInputs(
        logprobs=logprobs,
        old_logprobs=old,
        rollout_logprobs=rollout,
        advantages=torch.tensor([1.0, 1.0, -2.0, 0.5, -0.5, 0.5]).double(),
        row=ROW,
        n_rows=3,
        algo=o.algo,
        reference_logprobs=reference,
    )


def loop(o, t, totals):
    """The same objective, token by token, with plain floats."""
    total, algo, logprobs = 0.0, o.algo, t.logprobs
    for i in range(len(logprobs)):
        same = [j for j in range(len(logprobs)) if t.row[j] == t.row[i]]
        old = t.old_logprobs
        a, now = t.advantages[i].item(), logprobs[i].item()
        if o is SFT:
            each = -now
        elif algo.loss == "cispo":
            each = -min(math.exp(now - old[i].item()), algo.cispo_max) * a * now
        else:
            ratio = math.exp(now - old[i].item())
            if algo.loss == "gspo":
                ratio = math.exp(sum((logprobs[j] - old[j]).item() for j in same) / len(same))
            each = -min(ratio * a, min(max(ratio, 1 - algo.clip_low), 1 + algo.clip_high) * a)
        if algo.tis_max > 0:
            each *= min(math.exp((old[i] - t.rollout_logprobs[i]).item()), algo.tis_max)
        if algo.kl_coef:
            d = now - t.reference_logprobs[i].item()
            each += (
                algo.kl_coef
                * ({"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[algo.kl_estimator])
            )
        each /= {
            "token": totals.tokens,
            "sequence": totals.rows * len(same),
            "constant": totals.rows * o.constant,
        }[algo.aggregation]
        total += each
    return total


@pytest.mark.parametrize("loss", ["grpo", "cispo", "gspo"])
@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("tis", [0.0, 1.1])
@pytest.mark.parametrize("estimator", ["", "k1", "k2", "k3"])
def test_objective_equals_the_loop(loss, aggregation, tis, estimator):
    o = objective(
        loss, aggregation, 7.0, tis_max=tis, kl_coef=0.1 if estimator else 0.0,
        kl_estimator=estimator or "k3", cispo_max=1.05,
    )  # fmt: skip
    t = tokens(o, -torch.rand(6).double(), -torch.rand(6).double())
    got, _ = objective_loss(o, t, Totals(9, 4))
    assert got.item() == pytest.approx(loop(o, t, Totals(9, 4)), rel=1e-12)


def test_an_entropy_bonus_is_taken_off_each_tokens_loss():
    """Two tokens of a batch of four: −(1/4)·(0.5·0.2 + 0.5·0.6) = −0.1 beside the other terms."""
    zero = torch.zeros(2)
    o = objective("grpo", entropy_coef=0.5)
    t = replace(tokens_of(zero, zero, zero), algo=o.algo, entropy=torch.tensor([0.2, 0.6]))
    got, _ = objective_loss(o, t, Totals(4, 1))
    assert got.item() == pytest.approx(-0.1)


@pytest.mark.parametrize("loss", ["grpo", "gspo"])
def test_gradients_by_finite_differences(loss):
    o = objective(loss, "sequence", tis_max=1.5, kl_coef=0.3)
    t = tokens(o, -torch.rand(6, generator=torch.Generator().manual_seed(1)).double())
    t = replace(t, reference_logprobs=t.logprobs - 0.1)
    # GSPO's token form has its true gradient only per row: all tokens of a row move together.
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)

    def value(shift):
        return objective_loss(o, replace(t, logprobs=t.logprobs + shift[ROW]), Totals(6, 3))[0]

    assert torch.autograd.gradcheck(value, (x,))


def test_with_one_update_every_loss_has_the_policy_gradient():
    """proximal = current: gradient is TIS · A, whatever the clip."""
    for name in ("grpo", "cispo", "gspo"):
        o = objective(name, tis_max=1.1)
        t = tokens(o)
        logprobs = t.logprobs.clone().requires_grad_()
        loss, metrics = objective_loss(o, replace(t, logprobs=logprobs), Totals(6, 3))
        loss.backward()
        weight = (t.logprobs - t.rollout_logprobs).exp().clamp(max=1.1)
        assert torch.allclose(logprobs.grad, -weight * t.advantages / 6)
        assert metrics["ratio_mean"].tolist() == [1.0] * 6
        assert not metrics["clip_fraction"].any()


def test_parts_of_a_batch_add_up():
    o, totals = objective("gspo", "sequence"), Totals(6, 3)
    t = tokens(o)
    whole, _ = objective_loss(o, t, totals)
    parts = 0.0
    for rows in ([0, 1], [2]):
        pick = torch.isin(ROW, torch.tensor(rows))
        of_pick = (t.logprobs[pick], t.old_logprobs[pick], t.rollout_logprobs[pick])
        part = LossInputs(*of_pick, t.advantages[pick], ROW[pick] - rows[0], len(rows), o.algo)
        parts += objective_loss(o, part, totals)[0].item()
    assert parts == pytest.approx(whole.item())


def test_sft_is_cross_entropy():
    t = tokens(SFT)
    got, metrics = objective_loss(SFT, t, Totals(6, 3))
    assert got.item() == pytest.approx(-t.logprobs.mean().item())
    assert got.item() == pytest.approx(loop(SFT, t, Totals(6, 3)), rel=1e-12)
    assert metrics == {}


def test_wrong_names_suggest():
    with pytest.raises(ConfigError, match=r"algo.loss='cipso'.*Did you mean 'cispo'"):
        Objective.of(AlgoConfig(loss="cipso"))
    with pytest.raises(ConfigError, match=r"algo\.aggregation"):
        Objective.of(AlgoConfig(aggregation="mean"))
    with pytest.raises(ConfigError, match=r"algo\.kl_estimator"):
        Objective.of(AlgoConfig(kl_estimator="k4"))


# Losses from outside the package.

OUTSIDE = """
from rayrl.learner.loss import LossOutputs

def reinforce(inputs, *, baseline=0.0):
    loss = -(inputs.advantages - baseline) * inputs.logprobs
    return LossOutputs(loss, {"positive": inputs.advantages > 0})
"""


@pytest.fixture
def outside(tmp_path, monkeypatch):
    (tmp_path / "some_losses.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("some_losses", None)


def test_a_loss_is_found_in_a_file_or_module_with_its_arguments(outside):
    for place in ("some_losses", str(outside / "some_losses.py")):
        algo = {"loss": f"{place}:reinforce", "loss_args": {"baseline": 0.5}, "tis_max": 0.0}
        o = Objective.of(AlgoConfig(**algo))
        t = tokens(o)
        loss, metrics = objective_loss(o, t, Totals(6, 3))
        assert loss.item() == pytest.approx(-((t.advantages - 0.5) * t.logprobs).mean().item())
        assert metrics["loss/positive"].tolist() == [True, True, False, True, False, True]
        assert set(metrics) == {"ratio_mean", "approx_kl", "loss/positive"}


@pytest.mark.parametrize(
    ("algo", "said"),
    [
        ({"loss": "some_losses:reinforc"}, "no function 'reinforc'.*Did you mean 'reinforce'"),
        ({"loss": "some_losses:__name__"}, "is 'some_losses', not a function"),
        ({"loss": "some_loses:reinforce"}, "module 'some_loses' could not be imported"),
        ({"loss": "some_losses.py:reinforce"}, r"there is no file .*some_losses\.py"),
        (
            {"loss": "some_losses:reinforce", "loss_args": {"base_line": 1}},
            r"algo\.loss_args=.*some_losses\.reinforce.*Did you mean 'baseline'",
        ),
        ({"loss": "grpo", "loss_args": {"x": 1}}, r"algo\.loss_args=.*unexpected keyword .*'x'"),
    ],
)
def test_what_is_no_loss_is_said(outside, algo, said):
    with pytest.raises(ConfigError, match=said):
        Objective.of(AlgoConfig(**algo))


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda inputs: inputs.logprobs, "returned a Tensor; return LossOutputs"),
        (lambda inputs: LossOutputs(-inputs.logprobs.mean()), r"'loss' of shape \(\).*\(6,\) loss"),
        (lambda inputs: LossOutputs(-inputs.logprobs, {"x": 1.0}), "'x' of shape float"),
        (lambda inputs: LossOutputs(-inputs.logprobs.detach()), "without gradient"),
    ],
)
def test_what_a_loss_returns_is_checked(loss, said):
    o = replace(objective(), loss=resolve_loss(loss))
    t = tokens(o)
    t = replace(t, logprobs=t.logprobs.clone().requires_grad_())
    with pytest.raises(ConfigError, match=f"the loss .*test_loss.<lambda> .*{said}"):
        objective_loss(o, t, Totals(6, 3))


def test_the_names_that_settings_accept_are_those_that_are_registered():
    assert tuple(LOSSES) == _CHOICES["algo.loss"]
    assert tuple(ADVANTAGES) == _CHOICES["algo.advantage"]
