"""A mixture of two environments: killed in the middle of a batch, it ends as if unbroken."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from rayrl.run.files import read_jsonl
from tests.runs import ENVS, Going, command, episodes, figures, rows, train, weights

pytestmark = pytest.mark.slow

STEPS = 10  # enough that groups with the numbers that wait are drawn
SETTINGS = [
    "env.name=''",
    f"env.mix.one={{name: '{ENVS}:brief', rewards: {{any: 0.5}}}}",
    f"env.mix.two={{name: '{ENVS}:talk', max_tokens: 12, cells: {{a: {{}}, b: {{}}}}}}",
    "env.mix.two.temperature=0.7",
    "env.mix_by=tokens",
    "train.task_sampling=difficulty",
    "train.uniform_share=0.5",
    f"train.steps={STEPS}",
    "train.group_size=8",
    "sampling.max_tokens=16",
    "run.checkpoint_every=3",
    f"eval.every={STEPS}",
    "eval.at_start=false",
    "eval.episodes=4",
]


def test_killed_in_the_middle_of_a_batch(tiny: Path, tmp_path: Path) -> None:
    calm, killed, count = tmp_path / "calm", tmp_path / "killed", tmp_path / "count"
    train(tiny, calm, *SETTINGS)
    env = {**os.environ, "TALK_CLOSED": str(count)}
    with Going(command(tiny, killed, *SETTINGS), env) as run:
        run.until(lambda: count.is_file() and len(count.read_bytes()) >= 8)  # a whole group waits
    assert 0 < rows(killed) < STEPS, "the draws of some batch depend on those before"
    with Going(command(tiny, killed, *SETTINGS)) as run:
        assert run.wait() == 0, run.said
    assert figures(killed) == figures(calm)
    assert weights(killed) == weights(calm)
    assert episodes(killed) == episodes(calm)

    written: Counter[str] = Counter()
    begun: Counter[str] = Counter()
    for row, step in zip(figures(calm), sorted(episodes(calm)), strict=True):
        for name in ("one", "two"):
            own = [one for one in episodes(calm)[step] if one["env"] == name]
            assert row[f"episodes/{name}"] == len(own) > 0
            groups = [own[k : k + 8] for k in range(0, len(own), 8)]
            # every other group of a component is drawn uniformly
            uniform = [e for k, g in enumerate(groups, begun[name]) if k % 2 for e in g]
            begun[name] += len(groups)
            if uniform:
                rewards = [one["rewards"]["agent"] for one in uniform]
                assert row[f"reward/{name}"] == pytest.approx(sum(rewards) / len(rewards))
                scores = [one["scores"]["agent"]["vowels"] for one in uniform]
                assert row[f"score/{name}/vowels"] == pytest.approx(sum(scores) / len(scores))
            assert (f"reward/{name}" in row) == bool(uniform)
            assert 0 <= row[f"pools/{name}/unseen"] < 1
            tokens = [len(turn["completion_ids"]) for one in own for turn in one["turns"]]
            assert row[f"tokens/{name}"] == sum(tokens)
            assert max(tokens) <= {"one": 16, "two": 12}[name]
            at = {turn.get("temperature") for one in own for turn in one["turns"]}
            assert at == {"one": {None}, "two": {0.7}}[name]
            written[name] += sum(tokens)
        assert "score/vowels" not in row
        assert row["mismatch/max"] < 1e-4, "each divides by its temperature"
        assert {"eval/one/reward", "eval/two/a/reward"} <= row.keys() or row["step"] < STEPS - 1
    assert written["one"] == pytest.approx(written["two"], rel=0.25), "shares of tokens"
    for one in read_jsonl(calm / "evaluations" / f"version_{STEPS:06d}.jsonl"):
        assert one["env"] == one["id"].split("-")[2].partition("/")[0]
