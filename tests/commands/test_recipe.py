from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rayrl.commands import recipe
from rayrl.commands.recipe import chain, rows
from rayrl.config import Config, from_dict
from rayrl.errors import ConfigError, RunFailed
from rayrl.report.statistics import Share
from rayrl.report.table import Cell, Result
from rayrl.run.folder import RunDir, read_config
from tests.tiny import save_tiny_model

STAGES = [
    {"name": "eval_teacher", "verb": "eval", "set": {"eval.player": "teacher"}},
    {"name": "eval_base", "verb": "eval"},
    {"name": "synth", "verb": "synth"},
    {"name": "sft", "verb": "sft", "set": {"learner.lr": 0.5}},
    {"name": "rl1", "verb": "train"},
    {"name": "rl2", "verb": "train"},
    {"name": "eval_rl2", "verb": "eval"},
]


def config(folder: Path | str = "runs/a", stages: list[dict[str, Any]] = STAGES) -> Config:
    return from_dict(
        {
            "run": {"dir": str(folder), "name": "a"},
            "env": {"name": "tictactoe"},
            "eval": {"episodes": 4},
            "recipe": stages,
        }
    )


def paths(links: list[recipe.Link]) -> dict[str, str]:
    return {link.stage.name: link.config.model.path for link in links}


# --- what each stage gets from the ones before ---------------------------------------------------


def test_each_stage_starts_from_the_newest_model() -> None:
    assert paths(chain(config())) == {
        "eval_teacher": "embedded",
        "eval_base": "embedded",
        "synth": "embedded",
        "sft": "embedded",
        "rl1": "runs/a/sft/model",
        "rl2": "runs/a/rl1/model",
        "eval_rl2": "runs/a/rl2/model",
    }


def test_a_stage_that_names_its_model_keeps_it() -> None:
    stages = [*STAGES[:4], {"name": "rl1", "verb": "train", "set": {"model.path": "mine"}}]
    assert paths(chain(config(stages=stages)))["rl1"] == "mine"


def test_data_folders_names_and_rows() -> None:
    links = {link.stage.name: link for link in chain(config())}
    sft = links["sft"].config
    assert sft.sft.data == "runs/a/synth/episodes.jsonl"
    assert (sft.run.dir, sft.run.name) == ("runs/a/sft", "a-sft")
    assert sft.learner.lr == 0.5
    assert sft.recipe == []
    assert [link.row for link in links.values() if link.row] == ["teacher", "base", "rl2"]


def test_synth_may_write_elsewhere_and_sft_may_read_elsewhere() -> None:
    out = [{"name": "s", "verb": "synth", "set": {"synth.out": "x.jsonl"}}]
    sft = {"name": "t", "verb": "sft"}
    assert chain(config(stages=[*out, sft]))[1].config.sft.data == "x.jsonl"
    sft["set"] = {"sft.data": "y.jsonl"}  # type: ignore[assignment]
    assert chain(config(stages=[*out, sft]))[1].config.sft.data == "y.jsonl"


# --- running -------------------------------------------------------------------------------------


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Programs that only note that they ran; `fail` in a stage's name makes it fail."""
    ran: list[str] = []

    def program(cfg: Config) -> None:
        name = Path(cfg.run.dir).name
        ran.append(name)
        with RunDir(cfg.run.dir, cfg) as folder:
            if name.startswith("eval"):
                cells = {"tasks": Cell({}, 4, 0, {"win": Share(len(ran), 10)})}
                Result("x", cells).save(folder.path / "eval.json")
            if name == "rl2" and ran.count("rl2") == 1:
                raise RunFailed("the disk is full")
            folder.finish({})

    @contextmanager
    def session(*_: object, imports: Sequence[str]) -> Iterator[None]:
        ran.append("ray")
        yield

    monkeypatch.setattr(recipe, "open_session", session)
    monkeypatch.setattr(recipe, "PROGRAMS", dict.fromkeys(recipe.PROGRAMS, program))
    return ran


def test_a_stopped_recipe_goes_on_where_it_stopped(
    tmp_path: Path, fakes: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config(tmp_path / "a")
    names = [str(stage["name"]) for stage in STAGES]
    with pytest.raises(RunFailed, match="disk is full"):
        recipe.run(cfg)
    assert fakes == ["ray", *names[:6]]
    assert not (tmp_path / "a" / "table.md").exists()

    fakes.clear()
    fakes.append("rl2")  # the second time it has room
    recipe.run(cfg)
    assert fakes == ["rl2", "ray", "rl2", "eval_rl2"]
    out = capsys.readouterr().out
    assert "4/7 sft (sft): finished before" in out
    assert "GiB" in out

    fakes.clear()
    recipe.run(cfg)
    assert fakes == []  # not even Ray
    assert "teacher" in capsys.readouterr().out


def test_nothing_is_made_from_a_stage_that_is_not_finished(
    tmp_path: Path, fakes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(cfg: Config) -> None:
        fakes.append(Path(cfg.run.dir).name)

    monkeypatch.setitem(recipe.PROGRAMS, "synth", lost)  # type: ignore[arg-type]
    with pytest.raises(RunFailed, match=r"stage 'synth' is not finished.*same command goes on"):
        recipe.run(config(tmp_path / "a"))
    assert fakes == ["ray", "eval_teacher", "eval_base", "synth"]


def test_changed_settings_of_a_finished_stage_are_refused(tmp_path: Path, fakes: list[str]) -> None:
    def changed(**settings: object) -> Config:
        rl1 = {"name": "rl1", "verb": "train", "set": settings}
        return config(tmp_path / "a", [*STAGES[:4], rl1, STAGES[6]])

    recipe.run(changed(**{"train.steps": 3}))
    fakes.clear()
    for settings, said in (
        ({"train.steps": 9}, r"a/rl1 holds .*\n  train\.steps: 3 there, 9 now\n.*run\.name"),
        ({"train.steps": 3, "learner.lr": 0.5}, r"learner\.lr: None there, 0\.5 now"),
    ):
        with pytest.raises(ConfigError, match=said) as caught:
            recipe.run(changed(**settings))
        assert str(caught.value).endswith(f"again: {tmp_path}/a/rl1 {tmp_path}/a/eval_rl2")
    recipe.run(changed(**{"train.steps": 3, "cluster.replicas": 2, "run.checkpoint_every": 1}))
    assert fakes == []


def test_the_table_is_written_as_markdown_and_json(tmp_path: Path, fakes: list[str]) -> None:
    cfg = config(tmp_path / "a", [stage for stage in STAGES if stage["name"] != "rl2"])
    recipe.run(cfg)
    table = (tmp_path / "a" / "table.md").read_text().splitlines()
    assert table[0] == "|  | tasks: win |"
    assert [line.split("|")[1].strip() for line in table[2:5]] == ["teacher", "base", "rl1"]
    data = json.loads((tmp_path / "a" / "table.json").read_text())
    assert [row["name"] for row in data] == ["teacher", "base", "rl1"]
    assert (tmp_path / "a" / "report.html").is_file()
    record = json.loads((tmp_path / "a" / "recipe.json").read_text())
    assert set(record["seconds"]) == {str(s["name"]) for s in STAGES} - {"rl2"}
    assert record["peak_memory"] > 0
    assert "torch" in record["versions"]
    stored = read_config(tmp_path / "a" / "sft")
    assert stored.sft.data == str(tmp_path / "a" / "synth" / "episodes.jsonl")
    assert [row.name for row in rows(chain(cfg))] == ["teacher", "base", "rl1"]


def test_nothing_starts_when_a_stage_makes_no_sense(tmp_path: Path, fakes: list[str]) -> None:
    stages = [*STAGES, {"name": "bad", "verb": "train", "set": {"train.group_size": 1}}]
    with pytest.raises(ConfigError, match=r"train\.group_size=1"):
        recipe.run(config(tmp_path / "a", stages))
    assert fakes == []


OWN = """
import torch
from rayrl.learner.loss import LossOutputs

def loss(inputs, scale):
    per_token = -scale * inputs.advantages * inputs.logprobs
    return LossOutputs(per_token, {"twice": torch.full_like(per_token, scale)})

def ranks(inputs):
    return [[float(k) for _ in own] for k, own in enumerate(inputs.turns)]
"""


@pytest.mark.slow
def test_a_whole_recipe_on_ray(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every verb for real, on a model that knows nothing."""
    model = save_tiny_model(tmp_path / "model")
    (tmp_path / "own.py").write_text(OWN)
    own = {"algo.loss": f"{tmp_path}/own.py:loss", "algo.advantage": f"{tmp_path}/own.py:ranks"}
    stages: list[dict[str, Any]] = [
        {"name": "synth", "verb": "synth"},
        {
            "name": "sft",
            "verb": "sft",
            "set": {"learner.lr": 0.01, "eval.every": 3, "run.keep_best": "eval/copied"},
        },
        {"name": "rl", "verb": "train", "set": {**own, "algo.loss_args": {"scale": 2.0}}},
        {"name": "eval", "verb": "eval"},
        {"name": "eval_perfect", "verb": "eval", "set": {"eval.player": "perfect"}},
    ]
    cfg = from_dict(
        {
            "run": {"dir": str(tmp_path / "run"), "name": "run", "checkpoint_every": 2},
            "env": {"name": "copyword"},
            "model": {"path": str(model)},
            "sampling": {"max_tokens": 12},
            "train": {"groups": 2, "group_size": 2, "steps": 2},
            "synth": {"player": "perfect", "episodes": 16, "show": 1},
            "sft": {"steps": 4, "batch_size": 8},
            "eval": {"episodes": 6},
            "recipe": stages,
        }
    )
    recipe.run(cfg)
    found = {row.name: row.cells["tasks"] for row in rows(chain(cfg))}
    assert found["perfect"].statistics["copied"].value == 1.0  # type: ignore[union-attr]
    assert found["rl"].episodes == 6
    lines = (tmp_path / "run/sft/metrics.jsonl").read_text().splitlines()
    learned = [json.loads(line) for line in lines]
    assert learned[-1]["loss"] < learned[0]["loss"]
    assert [row.get("eval/version") for row in learned] == [None, None, 3, 4]
    assert learned[0]["eval_start/version"] == 0
    assert (tmp_path / "run" / "sft" / "model_best" / "config.json").is_file()
    assert (tmp_path / "run" / "rl" / "model" / "config.json").is_file()
    lines = (tmp_path / "run" / "rl" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss/twice"] for line in lines] == [2.0, 2.0]
    assert "Repeat this word" in (tmp_path / "run" / "report.html").read_text()
    assert "perfect" in capsys.readouterr().out
