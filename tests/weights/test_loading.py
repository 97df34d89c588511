"""A checkpoint that does not match its architecture is refused by learner and engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rayrl.chat.renderer import Chat
from rayrl.config import Config, EngineConfig, LearnerConfig
from rayrl.engine import open_engine
from rayrl.errors import ConfigError
from rayrl.learner.reference import ReferenceLearner
from rayrl.weights.loading import check_weights, load_causal_lm
from rayrl.weights.model_dir import EMBEDDED, model_dir
from tests.architectures import ARCHITECTURES, Change, change_weights, save_model

pytestmark = pytest.mark.usefixtures("one_thread")

WeightSync = dict[str, Any]


def into_learner(folder: Path) -> None:
    ReferenceLearner(Config(learner=LearnerConfig(kind="reference")), folder)


def into_engine(folder: Path) -> None:
    open_engine(folder, EngineConfig())


READERS = {"learner": into_learner, "embedded engine": into_engine, "before vLLM": check_weights}


def without(*parts: str) -> Change:
    return lambda weights: {
        name: weight for name, weight in weights.items() if not any(part in name for part in parts)
    }


def prefixed(prefix: str) -> Change:
    return lambda weights: {prefix + name: weight for name, weight in weights.items()}


def grown(part: str) -> Change:
    return lambda weights: {
        name: torch.cat([weight, weight]) if part in name else weight
        for name, weight in weights.items()
    }


def with_more(name: str) -> Change:
    return lambda weights: {**weights, name: torch.zeros(3)}


MISMATCHES: dict[str, tuple[str, Change, str]] = {
    "torch.compile": (
        "llama",
        prefixed("_orig_mod."),
        r"21 missing \(lm_head.weight, .*, …\), 21 unknown \(_orig_mod.*begin with '_orig_mod.'",
    ),
    "a prefix on a tied model": (
        "llama tied",
        prefixed("module."),
        r"unknown \(module\.model.*begin with 'module.'",
    ),
    "a layer": ("llama", without("layers.1."), r"9 missing \(model\.layers\.1\.input_layernorm"),
    "one norm": ("qwen3", without("0.self_attn.q_norm"), r"1 missing \(model.layers.0.*q_norm"),
    "the head of an untied model": ("llama", without("lm_head"), r"1 missing \(lm_head\.weight"),
    "tied embeddings": ("llama tied", without("embed_tokens"), r"missing \(.*embed_tokens"),
    "a bias": ("opt", without("0.fc1.bias"), r"1 missing \(model\.decoder\.layers\.0\.fc1\.bias"),
    "another shape": (
        "llama",
        grown("0.mlp.up_proj"),
        r"1 of another shape \(.*0\.mlp\.up_proj\.weight \[96, 32\] instead of \[48, 32\]",
    ),
    "a longer vocabulary": ("gpt2", grown("wte"), r"wte.weight \[128, 32\] instead of \[64, 32\]"),
    "more": ("llama", with_more("model.layers.7.x"), r"1 unknown \(model\.layers\.7\.x"),
    "a value head": ("gpt2", with_more("v_head.weight"), r"1 unknown \(v_head\.weight"),
    "all experts of a layer": (
        "qwen3_moe",
        without("layers.1.mlp.experts"),
        r"2 missing \(model\.layers\.1\.mlp\.experts\.down_proj",
    ),
    "an expert": ("qwen3_moe", without("experts.2."), r"experts\.down_proj \[3, .* of \[4, "),
    "a part of an expert": (
        "mixtral",
        without("0.w1"),
        r"\(model\.layers\.\{0, 1\}\.mlp\.experts.gate_up",
    ),
    "a tied head that differs": (
        "llama tied",
        lambda weights: {
            **weights,
            "lm_head.weight": 2 * weights["model.embed_tokens.weight"],
        },
        r"ties lm_head\.weight to model\.embed_tokens\.weight, but both are stored and differ",
    ),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("case", MISMATCHES)
def test_a_checkpoint_that_does_not_match_its_architecture_is_refused(
    case: str, reader: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    name, change, message = MISMATCHES[case]
    folder = save_model(name, tmp_path / "m")
    change_weights(folder, change)
    with pytest.raises(ConfigError, match=message) as refused:
        READERS[reader](folder)
    assert str(refused.value).startswith(f"model.path={folder}: ")
    assert len(str(refused.value)) < 900
    assert "LOAD REPORT" not in capfd.readouterr().err  # the error says the same


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_checkpoints_saved_by_transformers_are_loaded(name: str, tmp_path: Path) -> None:
    """In the layout of checkpoints, and in the one of its modules (experts fused)."""
    for folder, layout in ((tmp_path / "old", True), (tmp_path / "new", False)):
        save_model(name, folder, save_original_format=layout)
        check_weights(folder)
        plain = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        ours = load_causal_lm(folder, dtype=torch.float32).state_dict()
        assert plain.keys() == ours.keys()
        assert all(torch.equal(plain[key], ours[key]) for key in plain)


def legacy_gpt2(weights: WeightSync) -> WeightSync:
    """As OpenAI's checkpoints on the hub: no prefix, and buffers of masks."""
    bare = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    return {**bare, "h.0.attn.bias": torch.ones(1, 1, 64, 64)}


def both_tied(weights: WeightSync) -> WeightSync:
    return {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}


LEGITIMATE: dict[str, tuple[str, Change]] = {
    "rotary buffers": ("llama", with_more("model.layers.0.self_attn.rotary_emb.inv_freq")),
    "no prefix and masks": ("gpt2", legacy_gpt2),
    "a tied head stored as well": ("llama tied", both_tied),
}


@pytest.mark.parametrize("case", LEGITIMATE)
def test_weights_that_transformers_ignores_or_renames_are_accepted(
    case: str, tmp_path: Path
) -> None:
    name, change = LEGITIMATE[case]
    folder = save_model(name, tmp_path)
    change_weights(folder, change)
    check_weights(folder)
    load_causal_lm(folder, dtype=torch.float32)


def test_sharded_and_pickled_weights_are_checked_too(tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path / "shards", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    check_weights(folder)
    pickled = save_model("llama", tmp_path / "pickled")
    model = AutoModelForCausalLM.from_pretrained(pickled)
    (pickled / "model.safetensors").unlink()
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    check_weights(pickled)
    torch.save(prefixed("_orig_mod.")(model.state_dict()), pickled / "pytorch_model.bin")
    for reader in READERS.values():
        with pytest.raises(ConfigError, match=r"begin with '_orig_mod\.'"):
            reader(pickled)


def test_the_embedded_base_model_matches_its_architecture() -> None:
    check_weights(model_dir(EMBEDDED))
    load_causal_lm(model_dir(EMBEDDED), dtype=torch.float32)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("damage", ["cut", "empty", "gone"])
def test_an_error_about_a_damaged_file_names_its_folder(
    damage: str, reader: str, tmp_path: Path
) -> None:
    folder = save_model("llama", tmp_path)
    file = folder / "model.safetensors"
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content[:200] if damage == "cut" else b"")
    if (reader, damage) == ("before vLLM", "gone"):
        return  # nothing to check; vLLM reports it
    with pytest.raises(ConfigError, match=f"model.path={folder}: cannot be loaded"):
        READERS[reader](folder)


@pytest.fixture
def no_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: object) -> str:
        raise AssertionError("transformers asked whether to run code")

    monkeypatch.setattr("builtins.input", ask)


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.usefixtures("no_prompt")
@pytest.mark.parametrize("reader", ["learner", "embedded engine"])
def test_code_of_a_model_is_never_run(reader: str, tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path)
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "own.py").write_text("raise SystemExit('code of the model was run')")
    edit(folder / "config.json", auto_map=code)  # beside an architecture that transformers has
    load_causal_lm(folder, dtype=torch.float32)
    edit(folder / "config.json", model_type="own", auto_map=code)
    with pytest.raises(ConfigError, match=r"needs Python code.*which rayrl does not run"):
        READERS[reader](folder)


@pytest.mark.usefixtures("no_prompt")
def test_code_of_a_tokenizer_is_never_run(tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path)
    (folder / "own.py").write_text("raise SystemExit('code of the tokenizer was run')")
    settings = {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"cannot load a tokenizer: it needs Python code"):
        Chat.load(str(folder))
