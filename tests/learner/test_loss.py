"""Losses against numbers worked by hand, a float64 loop, and finite differences."""

import math

import pytest
import torch

from rayrl.config import AlgoConfig
from rayrl.errors import ConfigError
from rayrl.learner.batch import Totals
from rayrl.learner.loss import (
    SFT,
    LossTokens,
    Objective,
    cispo,
    clipped,
    gspo,
    kl,
    objective_loss,
    tis_weights,
    token_weights,
)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


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
    loss, cut = cispo(logprobs, old, f64(3, 1), 1.5)
    assert loss.tolist() == pytest.approx(
        [-1.5 * 3 * (-2 + math.log(2)), -0.5 * (-1 + math.log(0.5))]
    )
    assert cut.tolist() == [True, False]
    loss.sum().backward()
    assert logprobs.grad.tolist() == pytest.approx([-4.5, -0.5])


def test_gspo_by_hand():
    # Row 0: log ratios 0.1 and 0.3, s = e^0.2 (inside); row 1: 0.5, s = e^0.5 (cut, A > 0).
    logprobs = f64(0.1, 0.5, 0.3).requires_grad_()
    row = torch.tensor([0, 1, 0])
    loss, cut = gspo(logprobs, f64(0, 0, 0), f64(2, 1, 2), row, 2, 0.25, 0.25)
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
    loss, _ = gspo(a, old, adv, row, 2, 0.2, 0.2)
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


def tokens(n=6, **more):
    g = torch.Generator().manual_seed(3)
    rollout = -torch.rand(n, generator=g).double() * 3
    return rollout + 0.2 * torch.randn(n, generator=g).double(), LossTokens(
        row=ROW,
        n_rows=3,
        advantages=torch.tensor([1.0, 1.0, -2.0, 0.5, -0.5, 0.5]).double(),
        rollout=rollout,
        **more,
    )


def loop(o, logprobs, t, totals):
    """The same objective, token by token, with plain floats."""
    total = 0.0
    for i in range(len(logprobs)):
        same = [j for j in range(len(logprobs)) if t.row[j] == t.row[i]]
        prox = logprobs if t.proximal is None else t.proximal
        old = prox if o.tis_max > 0 else t.rollout
        a, now = t.advantages[i].item(), logprobs[i].item()
        if o.loss == "sft":
            each = -now
        elif o.loss == "cispo":
            each = -min(math.exp(now - old[i].item()), o.cispo_max) * a * now
        else:
            ratio = math.exp(now - old[i].item())
            if o.loss == "gspo":
                ratio = math.exp(sum((logprobs[j] - old[j]).item() for j in same) / len(same))
            each = -min(ratio * a, min(max(ratio, 1 - o.clip_low), 1 + o.clip_high) * a)
        if o.tis_max > 0:
            each *= min(math.exp((prox[i] - t.rollout[i]).item()), o.tis_max)
        if o.kl_coef:
            d = now - t.reference[i].item()
            each += (
                o.kl_coef * {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[o.kl_estimator]
            )
        each /= {
            "token": totals.tokens,
            "sequence": totals.rows * len(same),
            "constant": totals.rows * o.constant,
        }[o.aggregation]
        total += each
    return total


@pytest.mark.parametrize("loss", ["grpo", "cispo", "gspo", "sft"])
@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("tis", [0.0, 1.1])
@pytest.mark.parametrize("estimator", ["", "k1", "k2", "k3"])
def test_objective_equals_the_loop(loss, aggregation, tis, estimator):
    if loss == "sft" and (tis or estimator):
        return
    more = {"proximal": -torch.rand(6).double(), "reference": -torch.rand(6).double()}
    logprobs, t = tokens(**more)
    o = Objective(
        loss, aggregation, tis_max=tis, constant=7.0, kl_coef=0.1 if estimator else 0.0,
        kl_estimator=estimator or "k3", cispo_max=1.05,
    )  # fmt: skip
    got, _ = objective_loss(o, logprobs, t, Totals(9, 4))
    assert got.item() == pytest.approx(loop(o, logprobs, t, Totals(9, 4)), rel=1e-12)


def test_an_entropy_bonus_is_taken_off_each_tokens_loss():
    """Two tokens of a batch of four: −(1/4)·(0.5·0.2 + 0.5·0.6) = −0.1 beside the other terms."""
    zero = torch.zeros(2)
    t = LossTokens(
        torch.zeros(2, dtype=torch.int64), 1, zero, zero, entropy=torch.tensor([0.2, 0.6])
    )
    got, _ = objective_loss(Objective("grpo", entropy_coef=0.5), zero, t, Totals(4, 1))
    assert got.item() == pytest.approx(-0.1)


@pytest.mark.parametrize("loss", ["grpo", "gspo"])
def test_gradients_by_finite_differences(loss):
    logprobs, t = tokens(proximal=-torch.rand(6, generator=torch.Generator().manual_seed(1)))
    reference = {"reference": logprobs - 0.1}
    t = LossTokens(t.row, 3, t.advantages, t.rollout, t.proximal.double(), **reference)
    o = Objective(loss, "sequence", tis_max=1.5, kl_coef=0.3)
    # GSPO's token form has its true gradient only per row: all tokens of a row move together.
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)

    def value(shift):
        return objective_loss(o, logprobs + shift[ROW], t, Totals(6, 3))[0]

    assert torch.autograd.gradcheck(value, (x,))


def test_with_one_update_every_loss_has_the_policy_gradient():
    """proximal = current: gradient is TIS · A, whatever the clip."""
    for name in ("grpo", "cispo", "gspo"):
        logprobs, t = tokens()
        logprobs.requires_grad_()
        loss, terms = objective_loss(Objective(name, tis_max=1.1), logprobs, t, Totals(6, 3))
        loss.backward()
        weight = (logprobs - t.rollout).exp().clamp(max=1.1).detach()
        assert torch.allclose(logprobs.grad, -weight * t.advantages / 6)
        assert terms["ratio"].tolist() == [1.0] * 6
        assert not terms["clipped"].any()


def test_parts_of_a_batch_add_up():
    logprobs, t = tokens()
    o, totals = Objective("gspo", "sequence"), Totals(6, 3)
    whole, _ = objective_loss(o, logprobs, t, totals)
    parts = 0.0
    for rows in ([0, 1], [2]):
        pick = torch.isin(ROW, torch.tensor(rows))
        part = LossTokens(ROW[pick] - rows[0], len(rows), t.advantages[pick], t.rollout[pick])
        parts += objective_loss(o, logprobs[pick], part, totals)[0].item()
    assert parts == pytest.approx(whole.item())


def test_sft_is_cross_entropy():
    logprobs, t = tokens()
    got, terms = objective_loss(SFT, logprobs, t, Totals(6, 3))
    assert got.item() == pytest.approx(-logprobs.mean().item())
    assert terms == {}


def test_wrong_names_suggest():
    with pytest.raises(ConfigError, match=r"algo.loss='cipso'.*Did you mean 'cispo'"):
        Objective.of(AlgoConfig(loss="cipso"), 1)
    with pytest.raises(ConfigError, match=r"algo\.aggregation"):
        Objective.of(AlgoConfig(aggregation="mean"), 1)
    with pytest.raises(ConfigError, match=r"algo\.kl_estimator"):
        Objective.of(AlgoConfig(kl_estimator="k4"), 1)
