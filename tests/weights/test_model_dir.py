"""Defaults by the kind of model, what `plan` says about them, and errors about missing models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rayrl.cli import compose
from rayrl.commands.plan import describe
from rayrl.config import from_dict
from rayrl.errors import ConfigError
from rayrl.learner.batch import batch_of
from rayrl.learner.reference import ReferenceLearner
from rayrl.run.start_check import Machine
from rayrl.weights.model_dir import (
    EMBEDDED,
    PRETRAINED,
    learning_rate,
    micro_batch_tokens,
    model_dir,
    parameter_count,
)
from tests.learner_rows import make_model, make_rows

MACHINE = Machine(2, 0, 8.0)


def pretrained(folder: Path, parameters: int = PRETRAINED) -> Path:
    """Write a model folder with `parameters` weights, all zero, of one byte each."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    half = {f"{name}.weight": torch.zeros(parameters // 2, dtype=torch.int8) for name in "ab"}
    save_file(half, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("size", "lora", "given", "rate"),
    [
        (EMBEDDED, 0, None, 3e-4),
        (EMBEDDED, 8, None, 3e-4),
        (PRETRAINED - 2, 0, None, 3e-4),
        (PRETRAINED, 0, None, 1e-5),
        (PRETRAINED, 8, None, 1e-4),
        (PRETRAINED, 0, 0.5, 0.5),
        (EMBEDDED, 0, 0.5, 0.5),
    ],
)
def test_the_default_learning_rate_depends_on_the_kind_of_model(
    size: Any, lora: int, given: float | None, rate: float, tmp_path: Path
) -> None:
    folder = model_dir(EMBEDDED) if size == EMBEDDED else pretrained(tmp_path / "m", size)
    config = from_dict({"learner": {"lr": given}, "lora": {"rank": lora}})
    assert learning_rate(config, folder) == rate


@pytest.mark.parametrize(
    ("size", "settings", "tokens"),
    [
        (PRETRAINED - 2, {}, 8192),
        (PRETRAINED, {}, 1024),
        (PRETRAINED, {"cluster": {"learner_gpus": 1}}, 8192),
        (PRETRAINED, {"learner": {"micro_batch_tokens": 3}}, 3),
        (PRETRAINED - 2, {"learner": {"micro_batch_tokens": 3}}, 3),
    ],
)
def test_the_default_micro_batch_depends_on_model_and_device(
    size: int, settings: dict[str, Any], tokens: int, tmp_path: Path
) -> None:
    folder = pretrained(tmp_path / "m", size)
    config = from_dict(settings)
    gpu = config.cluster.learner_gpus > 0
    assert micro_batch_tokens(config, folder, gpu=gpu) == tokens
    shown = [f"{part}.{key}={one}" for part, own in settings.items() for key, one in own.items()]
    assert f"of at most {tokens} tokens" in planned(folder, *shown)


def test_parameters_are_counted_in_every_file_format(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    assert parameter_count(folder) == 0
    torch.save({"w": torch.zeros(1000, 50)}, folder / "pytorch_model.bin")
    assert parameter_count(folder) == pytest.approx(50_000, rel=0.05)
    save_file({"w": torch.zeros(3, 5), "scalar": torch.zeros(())}, folder / "a.safetensors")
    save_file({"v": torch.zeros(7, dtype=torch.bfloat16)}, folder / "b.safetensors")
    assert parameter_count(folder) == 15 + 1 + 7
    (folder / "b.safetensors").write_bytes(b"torn")
    assert parameter_count(folder) == 16


def test_the_learner_uses_the_default_rate(tmp_path: Path) -> None:
    config = from_dict({"learner": {"kind": "reference"}})
    learner = ReferenceLearner(config, make_model(tmp_path / "model"))
    assert config.learner.lr is None
    batch = batch_of(make_rows(0))
    assert learner.step(batch.rows, batch.totals)["lr"] == 3e-4


def test_the_rate_of_the_published_experiment_is_unchanged() -> None:
    config = compose(["experiment=tictactoe"])
    assert learning_rate(config, model_dir(config.model.path)) == 3e-4


def planned(model: Path | str, *settings: str) -> str:
    return describe(compose(["env=copyword", f"model.path={model}", *settings]), MACHINE)


def test_plan_shows_the_learning_rate(tmp_path: Path) -> None:
    large = pretrained(tmp_path / "m")
    assert "at 0.0003 (learner.lr=null: for a model of this size)" in planned(EMBEDDED)
    assert "at 1e-05 (learner.lr=null: for a pretrained model)" in planned(large)
    adapted = planned(large, "lora.rank=8")
    assert "at 0.0001 (learner.lr=null: for a pretrained model, with adapters)" in adapted
    assert "learning    at 0.002\n" in planned(large, "learner.lr=0.002")


@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        (["learner.lr=3e-4"], "learner.lr=0.0003 of training is 30 times the usual 1e-05"),
        (["learner.lr=1e-4"], ""),  # ten times: high, but some small models tolerate it
        (["learner.lr=3e-4", "lora.rank=8"], ""),
        (["learner.lr=2e-3", "lora.rank=8"], "is 20 times the usual 0.0001 for adapters"),
        ([], ""),
    ],
)
def test_plan_warns_about_a_rate_far_above_the_default(
    settings: list[str], warned: str, tmp_path: Path
) -> None:
    text = planned(pretrained(tmp_path / "m"), *settings)
    assert warned in text
    assert ("Warnings" in text) == bool(warned)
    assert "Warnings" not in planned(EMBEDDED, *settings)


def test_plan_names_the_recipe_stage_in_a_warning(tmp_path: Path) -> None:
    large = pretrained(tmp_path / "m")
    config = compose(["experiment=copyword", f"model.path={large}", "recipe.sft.learner.lr=0.01"])
    assert "learner.lr=0.01 of sft is 1000 times" in describe(config, MACHINE)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("Qwen/Qwen3-0.6B", "hf download Qwen/Qwen3-0.6B --local-dir models/Qwen3-0.6B"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "looks like the name of a model"),
        ("gpt2", "hf download gpt2 --local-dir models/gpt2"),
        ("embeded", "Did you mean 'embedded'?"),
        ("here/model", "/here/model has no config.json"),  # here/ is a folder
        ("./Qwen/Qwen3-0.6B", "has no config.json"),
        ("/srv/models/x", "has no config.json"),
        ("a/b/c", "has no config.json"),
    ],
)
def test_a_hub_id_is_distinguished_from_a_folder(
    path: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as refused:
        model_dir(path)
    assert str(refused.value).startswith(f"model.path={path}: ")
    assert message in str(refused.value)
    assert ("hf download" in str(refused.value)) == ("has no config.json" not in message)
