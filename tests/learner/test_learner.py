"""The learner against a plain forward per row, DeepSpeed against plain torch, and resuming."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rayrl.config import AlgoConfig, Config, EngineConfig, LearnerConfig, SamplingConfig
from rayrl.errors import ConfigError, DataError
from rayrl.learner import attention
from rayrl.learner.batch import Totals, Trajectory, batch_of, supervised_row
from rayrl.learner.deepspeed import DeepSpeedLearner
from rayrl.learner.forward import load_model, loss_of, scheduled_lr, token_logprobs
from rayrl.learner.loss import LOSSES, LossOutputs, Objective
from rayrl.learner.packing import pack
from rayrl.learner.reference import ReferenceLearner
from rayrl.native import missing
from rayrl.weights.flat import unflatten
from tests.apart import free_port
from tests.learner_rank import SEVERAL
from tests.learner_rows import UPDATES, make_model, make_rows
from tests.runs import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")

TIED_SHAPES = {
    "grouped": {},
    "multi-head": {"num_key_value_heads": 4, "tie_word_embeddings": False},
    "one key head": {"num_key_value_heads": 1},
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("learner") / "model")


def config(stage=0, micro=96, **algo):
    learner = LearnerConfig(zero_stage=stage, micro_batch_tokens=micro)
    return Config(learner=learner, algo=replace(AlgoConfig(), **algo))


def plain_logprobs(model, ids, temperature=1.0):
    """(T,) by an eager forward over one row; position 0 has none."""
    tensor = torch.from_numpy(np.asarray(ids, np.int64))
    logits = model(input_ids=tensor[None], use_cache=False).logits[0]
    logprobs = (logits / temperature).log_softmax(-1)
    return torch.cat([torch.zeros(1), logprobs[:-1].gather(1, tensor[1:, None])[:, 0]])


# The forward pass.


@pytest.mark.parametrize("shape", TIED_SHAPES)
def test_packed_logprobs_and_gradients_equal_a_forward_per_row(shape, tmp_path):
    folder = make_model(tmp_path / "model", **TIED_SHAPES[shape])
    rows = [*make_rows(0), make_rows(0)[2]]  # one row twice
    packed = pack([r.ids for r in rows], [r.loss_mask for r in rows])
    assert len(packed.ids) < 0.8 * packed.lengths.sum()
    ours = load_model(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    weights = torch.linspace(-1, 1, len(packed.row))
    got, entropy = token_logprobs(ours, packed, 0.7)
    (got * weights).sum().backward()
    want, want_entropy = torch.zeros(len(got)), torch.zeros(len(got))
    for b, i in enumerate(packed.order):
        mine = np.flatnonzero(packed.row == b)
        at = packed.position[mine]
        want[mine] = plain_logprobs(plain, rows[i].ids, 0.7)[at]
        ids = torch.from_numpy(rows[i].ids.astype(np.int64))[None]
        dist = torch.distributions.Categorical(logits=plain(input_ids=ids).logits[0] / 0.7)
        want_entropy[mine] = dist.entropy()[at - 1].detach()
    (want * weights).sum().backward()
    assert (got - want).abs().max() <= 1e-5
    assert (entropy - want_entropy).abs().max() <= 1e-5
    expected = dict(plain.named_parameters())
    for name, parameter in ours.named_parameters():
        reference = expected[name].grad
        assert (parameter.grad - reference).abs().max() <= 1e-5 * max(1, reference.abs().max())


def test_a_sliding_window_is_refused_where_it_would_bite(tmp_path):
    from transformers import MistralConfig, MistralForCausalLM

    cfg = MistralConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=16, vocab_size=40, sliding_window=10,
    )  # fmt: skip
    MistralForCausalLM(cfg).save_pretrained(tmp_path)
    model = load_model(tmp_path, max_len=10)
    short = pack([np.arange(8)], [np.arange(8) > 3])
    assert token_logprobs(model, short, 1.0)[0].shape == (4,)
    long = pack([np.arange(12)], [np.arange(12) > 3])
    with pytest.raises(ConfigError, match=r"longer than the sliding window \(10\)"):
        token_logprobs(model, long, 1.0)


def test_a_row_longer_than_what_was_tried_is_refused(model_dir):
    long = [Trajectory(np.arange(12), np.arange(12) > 3, *[np.zeros(12, np.float32)] * 2)]
    learner = ReferenceLearner(Config(engine=EngineConfig(max_len=11)), model_dir)
    batch = batch_of(long)
    with pytest.raises(ConfigError, match=r"engine\.max_len=11: a row has 12 ids"):
        learner.step(batch.rows, batch.totals)
    assert ReferenceLearner(Config(engine=EngineConfig(max_len=12)), model_dir).logprobs(long)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        ReferenceLearner(Config(), tmp_path)


# The step.


def test_one_step_by_hand(model_dir):
    """Gradient, clip and AdamW from the definition, on a plain model, one row at a time."""
    rows = make_rows(0)
    learner = ReferenceLearner(config(aggregation="sequence", tis_max=2.0), model_dir)
    metrics = learner.step(rows, Totals(sum(r.n_loss for r in rows), 20))
    plain = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation="eager")
    gaps = []
    for row in rows:
        mask = torch.from_numpy(row.loss_mask)
        logprobs = plain_logprobs(plain, row.ids)[mask]
        old = torch.from_numpy(row.rollout_logprobs)[mask]
        gaps += (logprobs - old).detach().abs().tolist()
        tis = (logprobs.detach() - old).exp().clamp(max=2.0)
        advantages = torch.from_numpy(row.advantages)[mask]
        (-(tis * advantages * logprobs).mean() / 20).backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    cfg = learner.cfg.learner
    torch.optim.AdamW(
        plain.parameters(), lr=cfg.lr, betas=tuple(cfg.betas), eps=cfg.eps, weight_decay=0.0
    ).step()
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert metrics["mismatch_mean"] == pytest.approx(np.mean(gaps), rel=1e-5)
    assert metrics["mismatch_max"] == pytest.approx(np.max(gaps), rel=1e-5)
    assert metrics["ratio_mean"] == 1.0
    assert (metrics["updates"], metrics["skipped"], metrics["lr"]) == (1, 0, cfg.lr)
    expected = dict(plain.named_parameters())
    for name, parameter in learner.module.named_parameters():
        assert torch.allclose(parameter, expected[name], atol=1e-6), name


@pytest.mark.parametrize("loss", ["grpo", "cispo", "gspo"])
@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_division_into_micro_batches_changes_nothing(model_dir, loss, aggregation):
    batch = batch_of(make_rows(0))
    got = []
    for micro in (30, 10_000):
        learner = ReferenceLearner(
            config(micro=micro, loss=loss, aggregation=aggregation, kl_coef=0.05), model_dir
        )
        got.append(learner.step(batch.rows, batch.totals))
    assert got[0]["grad_norm"] == pytest.approx(got[1]["grad_norm"], rel=1e-5)
    assert got[0]["loss"] == pytest.approx(got[1]["loss"], rel=1e-4, abs=1e-7)
    assert got[0]["distinct_tokens"] > got[1]["distinct_tokens"]


def test_the_entropy_bonus_climbs_the_entropy_of_the_sampling_distribution(model_dir):
    """Without advantages its gradient is that of the mean entropy, row by row, by plain torch."""
    rows = [replace(row, advantages=row.advantages * 0) for row in make_rows(0)]
    totals = batch_of(rows).totals
    learner = ReferenceLearner(config(entropy_coef=0.5), model_dir)
    module = load_model(model_dir, "cpu")
    module.set_attn_implementation("eager")
    for row in rows:
        logits = module(torch.from_numpy(row.ids.astype(np.int64))[None]).logits[0, :-1]
        drawn = (logits / learner.cfg.sampling.temperature)[torch.from_numpy(row.loss_mask[1:])]
        entropy = torch.distributions.Categorical(logits=drawn).entropy()
        (-0.5 * entropy.sum() / totals.tokens).backward()
    plain = torch.nn.utils.get_total_norm([p.grad for p in module.parameters()])
    before = learner.step(rows, totals)
    assert before["grad_norm"] == pytest.approx(float(plain), rel=1e-4)
    assert learner.step(rows, totals)["entropy"] > before["entropy"]


def test_dropped_rows_change_nothing(model_dir):
    rows = make_rows(0)
    zeroed = [replace(r, advantages=r.advantages * 0) if i % 3 else r for i, r in enumerate(rows)]
    totals = batch_of(rows).totals
    one, two = (ReferenceLearner(config(), model_dir) for _ in range(2))
    everything = one.step(zeroed, totals)
    kept = two.step([r for r in zeroed if r.advantages.any()], totals)
    assert kept["grad_norm"] == pytest.approx(everything["grad_norm"], rel=1e-5)
    assert kept["computed_loss_tokens"] < everything["computed_loss_tokens"]


def test_several_updates_use_the_policy_the_step_began_with(model_dir):
    rows = make_rows(0)
    batch = batch_of(rows)
    learner = ReferenceLearner(config(epochs=2, minibatches=2, loss="grpo"), model_dir)
    before = learner.logprobs(rows)
    metrics = learner.step(batch.rows, batch.totals)
    assert metrics["updates"] == 4
    assert metrics["approx_kl"] > 0
    assert metrics["ratio_max"] > 1.001
    # Mismatch is measured before the first update only, whatever was learned since.
    gap = [
        np.abs(b - r.rollout_logprobs)[r.loss_mask].max() for b, r in zip(before, rows, strict=True)
    ]
    assert metrics["mismatch_max"] <= max(gap) + 1e-5


def test_kl_pulls_towards_the_start(model_dir):
    batch = batch_of(make_rows(0))
    ends = []
    for coefficient in (0.0, 5.0):
        learner = ReferenceLearner(config(kl_coef=coefficient), model_dir)
        for _ in range(8):
            metrics = learner.step(batch.rows, batch.totals)
        ends.append(learner.logprobs(batch.rows))
    start = ReferenceLearner(config(), model_dir).logprobs(batch.rows)
    drift = [sum(np.abs(a - b).sum() for a, b in zip(end, start, strict=True)) for end in ends]
    assert drift[1] < drift[0]
    assert metrics["kl"] > 0


def test_a_loss_for_one_step_is_a_name_or_a_function(model_dir):
    def cispo_again(inputs):
        out = LOSSES.resolve("cispo")(inputs)
        return LossOutputs(out.loss, {**out.metrics, "own": torch.ones(len(out.loss))})

    batch = batch_of(make_rows(0))
    cfg = config(loss="gspo", tis_max=0.0, epochs=2)  # in which losses differ
    ends = {}
    for name, loss in {"given": "cispo", "function": cispo_again, "not": None}.items():
        learner = ReferenceLearner(cfg, model_dir)
        metrics = learner.step(batch.rows, batch.totals, loss)
        ends[name] = learner.flat_weights()[0]
        assert metrics.get("loss/own") == (1.0 if name == "function" else None)
    built_in = ReferenceLearner(replace(cfg, algo=replace(cfg.algo, loss="cispo")), model_dir)
    built_in.step(batch.rows, batch.totals)
    want = built_in.flat_weights()[0]
    assert (ends["given"] == want).all()
    assert (ends["function"] == want).all()
    assert not (ends["not"] == want).all()


MEASURED_BY_ROWS = {"loss", "entropy", "grad_norm"}
OF_POLICY = {"ratio_mean", "ratio_max", "clip_fraction", "approx_kl"}
MISMATCH = {"mismatch_mean", "mismatch_max", "mismatch_kl"}
ALWAYS = {
    "computed_loss_tokens",
    "distinct_tokens",
    "row_tokens",
    "lr",
    "updates",
    "skipped",
}


@pytest.mark.parametrize(
    ("algo", "also"),
    [
        ({"tis_max": 0.0, "kl_coef": 0.0}, set()),
        ({"tis_max": 2.0, "kl_coef": 0.0}, {"tis_truncated"}),
        ({"tis_max": 0.0, "kl_coef": 0.1}, {"kl"}),
        ({"tis_max": 2.0, "kl_coef": 0.1, "epochs": 2, "minibatches": 3}, {"kl", "tis_truncated"}),
    ],
)
def test_what_was_not_measured_has_no_figure(model_dir, algo, also):
    """Counts and the learning rate are always known; means are of something, or absent."""
    learner = ReferenceLearner(config(**algo), model_dir)
    before = {name: tensor.clone() for name, tensor in learner.named_weights()}
    assert set(learner.step([], Totals(100.0, 8.0))) == ALWAYS
    assert all(torch.equal(before[name], tensor) for name, tensor in learner.named_weights())
    rows = make_rows(0)
    whole = learner.step(rows, batch_of(rows).totals)
    assert set(whole) == ALWAYS | MEASURED_BY_ROWS | OF_POLICY | MISMATCH | also
    assert whole["entropy"] > 0
    assert set(learner.sft_step(rows, batch_of(rows).totals)) == ALWAYS | MEASURED_BY_ROWS


def test_logprobs_follow_the_sampling_temperature(model_dir):
    rows = make_rows(1)
    cfg = replace(config(micro=40), sampling=SamplingConfig(temperature=1.3))
    got = ReferenceLearner(cfg, model_dir).logprobs(rows)
    plain = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation="eager")
    for row, values in zip(rows, got, strict=True):
        want = plain_logprobs(plain, row.ids, 1.3).detach().numpy() * row.loss_mask
        assert np.abs(values - want).max() <= 1e-5
    greedy = replace(cfg, sampling=SamplingConfig(temperature=0.0))
    with pytest.raises(ConfigError, match=r"sampling\.temperature"):
        ReferenceLearner(greedy, model_dir).logprobs(rows)


def test_each_id_has_its_own_temperature(model_dir):
    """Siblings share sources, at which one was sampled at a temperature and another at none."""
    rng = np.random.default_rng(0)
    rows = []
    for row in make_rows(1):
        own = rng.choice(np.array([np.nan, 0.5, 2.0], np.float32), len(row.ids))
        rows += [row, replace(row, temperatures=own)]
    learner = ReferenceLearner(
        replace(config(micro=40), sampling=SamplingConfig(temperature=1.3)), model_dir
    )
    plain = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation="eager")
    wanted = []
    for row in rows:
        at = np.full(len(row.ids), np.nan) if row.temperatures is None else row.temperatures
        at = torch.from_numpy(np.where(np.isnan(at), 1.3, at))[1:, None].float()
        ids = torch.from_numpy(np.asarray(row.ids, np.int64))
        logprobs = (plain(input_ids=ids[None]).logits[0, :-1] / at).log_softmax(-1)
        chosen = logprobs.gather(1, ids[1:, None])[:, 0] * torch.from_numpy(row.loss_mask[1:])
        wanted.append(chosen)
    for want, values in zip(wanted, learner.logprobs(rows), strict=True):
        assert np.abs(values[1:] - want.detach().numpy()).max() <= 1e-5
    for one, values in zip(rows, learner.logprobs(rows, 0.8), strict=True):
        want = plain_logprobs(plain, one.ids, 0.8).detach().numpy() * one.loss_mask
        assert np.abs(values - want).max() <= 1e-5

    objective = Objective.of(replace(AlgoConfig(), loss="grpo", tis_max=0.0), 32.0)
    rows = [
        replace(row, rollout_logprobs=np.append(np.float32(0), want.detach().numpy()))
        for row, want in zip(rows, wanted, strict=True)
    ]
    totals = batch_of(rows).totals
    loss, tally = loss_of(learner.model, rows, objective, totals, 1.3, first=True)
    assert tally.metrics()["mismatch_max"] < 1e-5, "the learner's are those that were sampled from"
    loss.backward()
    advantages = [torch.from_numpy(row.advantages[1:]) for row in rows]
    whole = sum((a * w).sum() for a, w in zip(advantages, wanted, strict=True))
    (-whole / totals.tokens).backward()
    found = dict(learner.model.named_parameters())
    for name, weight in plain.named_parameters():
        scale = weight.grad.abs().max()
        assert (found[name].grad - weight.grad).abs().max() <= 1e-4 * scale + 1e-7, name


def test_sft_learns_what_it_is_shown(model_dir):
    learner = ReferenceLearner(
        replace(
            config(),
            learner=LearnerConfig(lr=1e-2),
            sampling=SamplingConfig(temperature=0.0),  # not its business
        ),
        model_dir,
        total_steps=30,
    )
    rows = [supervised_row([1, 2, 3, 20 + i], [False, True, True, True]) for i in range(2)]
    batch = batch_of(rows)
    losses = [learner.sft_step(batch.rows, batch.totals)["loss"] for _ in range(30)]
    # Two continuations are equally right: what remains is ln 2 on one token of three.
    assert losses[-1] == pytest.approx(math.log(2) / 3, abs=0.02)
    assert losses[0] > 1


@pytest.mark.parametrize("kind", ["reference", 0, 1, 2, 3])
def test_nothing_changes_where_a_gradient_is_not_finite(model_dir, kind):
    def make():
        if kind == "reference":
            return ReferenceLearner(config(), model_dir)
        return DeepSpeedLearner(config(kind), model_dir)

    batch, after = batch_of(make_rows(0)), batch_of(make_rows(1))
    learner, untouched = make(), make()
    for one in (learner, untouched):
        one.step(batch.rows, batch.totals)
    before, _ = learner.flat_weights()
    bad = [replace(batch.rows[0], advantages=batch.rows[0].advantages * np.nan), *batch.rows[1:]]
    metrics = learner.step(bad, batch.totals)
    assert (metrics["skipped"], metrics["updates"]) == (1, 0)
    # A finite loss whose gradient overflows.
    name = "model.layers.0.mlp.up_proj.weight"
    parameter = dict(learner.module.named_parameters())[name]
    hook = parameter.register_hook(lambda grad: grad * math.inf)
    metrics = learner.step(batch.rows, batch.totals)
    hook.remove()
    assert (metrics["skipped"], metrics["updates"]) == (1, 0)
    assert math.isfinite(metrics["loss"])
    assert (learner.flat_weights()[0] == before).all()
    # Moments and step count are untouched too: the next update is the one it would have been.
    learner.step(after.rows, after.totals)
    untouched.step(after.rows, after.totals)
    assert (learner.flat_weights()[0] == untouched.flat_weights()[0]).all()


def test_a_batch_without_rows_is_no_update(model_dir):
    learner = ReferenceLearner(config(), model_dir)
    batch = batch_of(make_rows(0))
    learner.step(batch.rows, batch.totals)
    before, _ = learner.flat_weights()
    metrics = learner.step([], batch.totals)  # momentum alone must not move it either
    assert (metrics["updates"], metrics["skipped"]) == (0, 0)
    assert (learner.flat_weights()[0] == before).all()
    assert learner.steps == 2


# DeepSpeed equals plain torch.


def reference_weights(model_dir, updates=UPDATES, **algo):
    learner = ReferenceLearner(config(**algo), model_dir)
    for seed in range(updates):
        batch = batch_of(make_rows(seed))
        metrics = learner.step(batch.rows, batch.totals)
    return learner.flat_weights()[0].view(np.float32), metrics


@pytest.mark.skipif(missing() is not None, reason=f"{missing()}")
def test_attention_in_cpp_and_in_torch_learn_the_same(model_dir, monkeypatch):
    in_cpp, _ = reference_weights(model_dir, **SEVERAL)
    monkeypatch.setattr(attention, "missing", lambda: "no compiler")
    in_torch, _ = reference_weights(model_dir, **SEVERAL)
    difference = np.abs(in_cpp - in_torch).max()
    assert 0 < difference <= 1e-6  # other bits, so both were used


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_equals_plain_torch(model_dir, stage):
    want, metrics = reference_weights(model_dir)
    learner = DeepSpeedLearner(config(stage), model_dir)
    for seed in range(UPDATES):
        batch = batch_of(make_rows(seed))
        got = learner.step(batch.rows, batch.totals)
    flat, manifest = learner.flat_weights()
    assert "lm_head.weight" not in manifest.names()  # tied: once
    difference = np.abs(flat.view(np.float32) - want).max()
    assert difference <= (1e-6 if stage == 3 else 1e-7)
    assert got["grad_norm"] == pytest.approx(metrics["grad_norm"], rel=1e-4)
    assert got.keys() == metrics.keys()


@pytest.mark.slow
def test_two_ranks_equal_one(model_dir, tmp_path):
    want, metrics = reference_weights(model_dir)
    (tmp_path / "model").symlink_to(model_dir)
    port = free_port()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.learner_rank"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(port), str(tmp_path)],
            env=env,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=600)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)[-4000:]
    for stage in range(4):
        got = np.load(tmp_path / f"stage{stage}.npy").view(np.float32)
        assert np.abs(got - want).max() <= 1e-6
        assert float(np.load(tmp_path / f"norm{stage}.npy")) == pytest.approx(
            metrics["grad_norm"], rel=1e-4
        )
        AutoModelForCausalLM.from_pretrained(tmp_path / f"export{stage}")
    want, _ = reference_weights(model_dir, **SEVERAL)
    got = np.load(tmp_path / "minibatches.npy").view(np.float32)
    assert np.abs(got - want).max() <= 1e-6


# Determinism, checkpoints, schedules.


def test_same_rows_same_weights(model_dir):
    one, two = reference_weights(model_dir)[0], reference_weights(model_dir)[0]
    assert (one == two).all()


@pytest.mark.parametrize("kind", ["reference", 0, 1, 2, 3])
def test_resume_is_exact(model_dir, tmp_path, kind):
    cfg = config(0 if kind == "reference" else kind, epochs=2, minibatches=2)
    cfg = replace(cfg, learner=replace(cfg.learner, schedule="cosine", warmup_steps=1))
    make = ReferenceLearner if kind == "reference" else DeepSpeedLearner
    unbroken = make(cfg, model_dir, total_steps=4)
    for seed in range(4):
        batch = batch_of(make_rows(seed))
        if seed == 2:
            unbroken.save(tmp_path / "save")
        unbroken.step(batch.rows, batch.totals)
    resumed = make(cfg, model_dir, total_steps=4)
    resumed.load(tmp_path / "save")
    assert resumed.steps == 2
    for seed in (2, 3):
        batch = batch_of(make_rows(seed))
        resumed.step(batch.rows, batch.totals)
    assert (resumed.flat_weights()[0] == unbroken.flat_weights()[0]).all()


def test_a_checkpoint_that_does_not_fit_is_refused(model_dir, tmp_path):
    learner = DeepSpeedLearner(config(1), model_dir)
    learner.save(tmp_path / "save")
    with pytest.raises(ConfigError, match=r"learner\.zero_stage=1, but now it is 0"):
        DeepSpeedLearner(config(0), model_dir).load(tmp_path / "save")
    with pytest.raises(DataError, match="not a learner checkpoint"):
        learner.load(tmp_path)
    (tmp_path / "learner.json").write_text(json.dumps({"steps": 1})[:-2])
    with pytest.raises(DataError, match="not a learner checkpoint"):
        learner.load(tmp_path)


@pytest.mark.parametrize("kind", ["reference", 0, 3])
def test_export_is_a_hugging_face_directory(model_dir, tmp_path, kind):
    cfg = config(0 if kind == "reference" else kind)
    learner = (ReferenceLearner if kind == "reference" else DeepSpeedLearner)(cfg, model_dir)
    batch = batch_of(make_rows(0))
    learner.step(batch.rows, batch.totals)
    learner.export(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.config._attn_implementation == "sdpa"
    state = again.state_dict()
    for name, tensor in unflatten(*learner.flat_weights()).items():
        assert torch.equal(state[name], tensor)


def test_rates_by_hand():
    def rates(**settings):
        cfg = LearnerConfig(lr=1.0, min_lr_ratio=0.1, **settings)
        return [round(scheduled_lr(cfg, step, 5), 6) for step in range(6)]

    assert rates(schedule="constant") == [1] * 6
    assert rates(schedule="constant", warmup_steps=3) == [0.25, 0.5, 0.75, 1, 1, 1]
    assert rates(schedule="linear") == [1, 0.775, 0.55, 0.325, 0.1, 0.1]
    half = round(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2, 6)
    assert rates(schedule="cosine")[:3] == [1, half, 0.55]
    with pytest.raises(ConfigError, match=r"learner\.schedule='step'"):
        rates(schedule="step")


def test_objective_of_the_config(model_dir):
    cfg = replace(config(aggregation="constant"), sampling=SamplingConfig(max_tokens=32))
    learner = ReferenceLearner(cfg, model_dir)
    assert learner.objective == Objective.of(cfg.algo, 32.0)


def test_a_generation_config_is_kept_as_it_is(model_dir, tmp_path):
    """Also one that transformers refuses to write: it is the start model's, not ours."""
    start = tmp_path / "start"
    shutil.copytree(model_dir, start)
    text = '{"do_sample": false, "temperature": 0.6}'
    (start / "generation_config.json").write_text(text)
    ReferenceLearner(config(0), start).export(tmp_path / "out")
    assert (tmp_path / "out" / "generation_config.json").read_text() == text


def test_what_cannot_be_exported_fails_before_the_first_step(model_dir, tmp_path):
    start = tmp_path / "start"
    shutil.copytree(model_dir, start)
    (start / "vocab.parts").mkdir()  # no file that can be copied
    with pytest.raises(ConfigError, match=r"model\.path=.*could not be exported.*vocab\.parts"):
        ReferenceLearner(config(0), start)


class _Evil:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("kind", ["reference", 0, 1])
def test_a_checkpoint_runs_nothing(model_dir, tmp_path, kind):
    cfg = config(0 if kind == "reference" else kind)
    learner = (ReferenceLearner if kind == "reference" else DeepSpeedLearner)(cfg, model_dir)
    learner.save(tmp_path / "save")
    state = max((tmp_path / "save").rglob("*.pt"), key=lambda file: file.stat().st_size)
    torch.save({"optimizer_state_dict": _Evil(tmp_path / "was-run")}, state)
    with pytest.raises(DataError, match=f"{state.name}: not a state.*wants to import posix.mkdir"):
        learner.load(tmp_path / "save")
    assert not (tmp_path / "was-run").exists()
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(DataError, match=f"{state.name}: not a state"):
        learner.load(tmp_path / "save")
