from __future__ import annotations

import asyncio
import importlib
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from rayrl import cli
from rayrl.cli import compose, main
from rayrl.commands import help_pages, plan
from rayrl.config import Config, from_dict, leaves, settings, to_dict, validate
from rayrl.config.load import ELSEWHERE, check_keys, nest
from rayrl.errors import ConfigError, RunFailed
from tests.documents import understand

CONF = Path(__file__).resolve().parent.parent / "conf"
FILES = sorted(file for file in CONF.glob("*/*.yaml"))


def program(monkeypatch: pytest.MonkeyPatch, verb: str, run: object) -> None:
    """Put `run` where the program of `verb` is."""
    module = types.ModuleType("stand_in")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "stand_in", module)
    monkeypatch.setitem(cli.VERBS, verb, ("stand_in", ""))


def error_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a wrong command line prints; it must exit with 2 and without a traceback."""
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    assert not out
    return err


# --- composition ---------------------------------------------------------------------------------


def test_defaults_and_an_override() -> None:
    config = compose(["train.steps=5"])
    assert config.train.steps == 5
    assert config.env.name == "tictactoe"
    assert config.train.groups == Config().train.groups


def test_experiment_overrides_a_group() -> None:
    config = compose(["experiment=copyword"])
    assert (config.env.name, config.run.dir) == ("copyword", "runs/copyword")


def test_command_line_beats_the_experiment() -> None:
    config = compose(
        ["experiment=tictactoe", "run.name=mine", "algo=rloo", "sampling.max_tokens=9"]
    )
    assert (config.run.dir, config.sampling.max_tokens) == ("runs/mine", 9)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("env.args.random_min=0.25", {"random_min": 0.25}),
        ("env.args={random_min: 0.25}", {"random_min": 0.25}),
        ("env.args.words=[a,b]", {"words": ["a", "b"]}),
    ],
)
def test_free_mappings_take_any_name(text: str, value: object) -> None:
    assert compose([text]).env.args == value


def test_group_by_its_own_key() -> None:
    config = compose(["env.name=path/to/file.py:game", "learner.lr=1e-4"])
    assert (config.env.name, config.learner.lr) == ("path/to/file.py:game", 1e-4)


def test_own_folder_of_files(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /algo: gspo\ntrain: {steps: 3}\n"
    )
    config = compose(["experiment=mine"], tmp_path)
    assert (config.train.steps, config.algo.loss) == (3, "gspo")
    with pytest.raises(ConfigError, match=r"'mine'.*copyword, mine, mixture, reverse_text"):
        compose(["experiment=mien"], tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {step: 3}", r"train\.step: .*'train\.steps'"),
        ("train: {steps: many}", r"train\.steps.*whole number"),
        ("recipe: [{name: a, verb: train, set: {train.step: 1}}]", r"'a': .*'train\.steps'"),
    ],
)
def test_wrong_file_is_an_error_with_a_suggestion(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}\n")
    with pytest.raises(ConfigError, match=message):
        validate(compose(["experiment=mine"], tmp_path))


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_file_composes(file: Path) -> None:
    extra = {
        "pretrained": ["model.path=somewhere"],
        "tictactoe_lfm2": ["endpoint.url=http://host/v1", "endpoint.model=teacher"],
        "gpu_colocated": ["engine=vllm"],
        "multi_node": ["engine=vllm"],
    }.get(file.stem, [])
    config = compose([f"{file.parent.name}={file.stem}", *extra])
    validate(config, "recipe" if config.recipe else "train")


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_files_hold_only_differences(file: Path) -> None:
    data = yaml.safe_load(file.read_text("utf-8")) or {}
    data.pop("defaults", None)
    if "# @package _global_" not in file.read_text("utf-8"):
        data = {file.parent.name: data}
    given, defaults = from_dict(data), from_dict({})
    for section, values in data.items():
        if section == "recipe":
            continue
        for name in values or {}:
            key = f"{section}.{name}"
            value, default = (getattr(getattr(c, section), name) for c in (given, defaults))
            assert value != default, f"{key}: {value} is the default"


# --- a stage of the recipe -----------------------------------------------------------------------


def test_setting_of_one_stage() -> None:
    config = compose(["experiment=copyword", "recipe.rl.train.steps=2", "recipe.rl.learner.lr=0.1"])
    stage = next(stage for stage in config.recipe if stage.name == "rl")
    assert stage.set == {"train.steps": 2, "learner.lr": 0.1}


def test_setting_that_a_stage_hides_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["experiment=copyword", "train.steps=2"]
    assert compose(words).train.steps == 2  # rayrl train uses it
    error = error_of(capsys, "recipe", *words)
    assert "recipe.rl.train.steps=2" in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recipe.lr.train.steps=2", "no stage 'lr'. Did you mean 'rl'?"),
        ("recipe.rl.train.step=2", "Did you mean 'train.steps'?"),
        ("recipe.rl=2", "write recipe.rl.KEY=VALUE"),
    ],
)
def test_wrong_setting_of_a_stage(
    capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    assert message in error_of(capsys, "recipe", "experiment=copyword", text)


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["tarin"], ["no such verb", "'train'"]),
        (["train", "train.step=5"], ["train.step:", "Did you mean 'train.steps'?"]),
        (["train", "trian.steps=5"], ["Did you mean 'train.steps'?"]),
        (["train", "train.steps=many"], ["train.steps='many': expected a whole number"]),
        (["train", "train.steps=1,2"], ["[1,2]"]),
        (
            ["train", "experiment=tictacto"],
            [
                "Did you mean 'tictactoe'?",
                "clerk_smollm2, copyword, mixture, reverse_text_smollm2, tictactoe",
            ],
        ),
        (["train", "algo=[a]"], ["choose one of"]),
        (["train", "env=tictacto"], ["no conf/env/tictacto.yaml", "Did you mean 'tictactoe'?"]),
        (["train", "env=textarena:2048-v0"], ["env.name=textarena:2048-v0."]),
        (["train", "env=./own.py:play"], ["env.name=./own.py:play."]),
        (["train", "model=pretrained"], ["model.path=: name a Hugging Face directory"]),
        (["train", "train.groups=0"], ["train.groups=0: must be 1 or more"]),
        (["train", "env.args={a: b"], ["cannot be read", "quotes"]),
        (["train", "train.stop_when=win > 3"], ["quotes: \"train.stop_when='win > 3'\"."]),
        (["train", "env.args.system=Say: it's"], ["quotes: 'env.args.system=\"Say: it's\"'."]),
        (["train", "env.args.system='\"a\" it's"], ["quotes: \"env.args.system='a: b'\"."]),
        (["train", "~train.steps"], ["not understood"]),
        (["train", "--confg-dir", "x"], ["Did you mean '--config-dir'?"]),
        (["train", "--config-dir", "nowhere"], ["no such folder"]),
        (["train", "tictactoe"], ["written key=value"]),
        (["report"], ["which run?"]),
        (["report", "nowhere"], ["there is no run here"]),
        (["env", "chek"], ["Did you mean 'check'?"]),
    ],
)
def test_wrong_use_says_what_to_do(
    capsys: pytest.CaptureFixture[str], words: list[str], messages: list[str]
) -> None:
    error = error_of(capsys, *words)
    for message in messages:
        assert message in error


def test_failure_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(config: Config) -> None:
        raise RunFailed("the environment failed too often; mend it")

    program(monkeypatch, "train", run)
    assert main(["train"]) == 1
    assert capsys.readouterr().err == "rayrl: the environment failed too often; mend it\n"
    monkeypatch.setenv("RAYRL_DEBUG", "1")
    with pytest.raises(RunFailed):
        main(["train"])


def test_interrupt_says_how_to_resume(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(config: Config) -> None:
        raise KeyboardInterrupt

    program(monkeypatch, "train", run)
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/rayrl"])
    assert main(["train", "run.name=it's"]) == 2  # quotes are Hydra's
    assert main(["train", "run.name=mine"]) == 130
    error = capsys.readouterr().err
    assert "resumes from runs/mine" in error
    assert error.endswith("  rayrl train run.name=mine\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["play"], "\nStopped.\n"),
        (["plan"], "\nStopped.\n"),
        (["env", "check"], "\nStopped.\n"),
        (["eval"], "\nStopped. The same command resumes from runs/tictactoe-eval:\n  rayrl eval"),
        (
            ["sft", "sft.data=x"],
            "\nStopped. The same command resumes from runs/tictactoe-sft:\n  rayrl sft",
        ),
    ],
)
def test_interrupt_promises_what_is_true(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: str,
) -> None:
    def run(config: Config) -> None:
        raise KeyboardInterrupt

    program(monkeypatch, words[0], run)
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/rayrl"])
    assert main(words) == 130
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize("ignored", [False, True], ids=["", "SIGINT ignored"])
@pytest.mark.parametrize("looping", [False, True], ids=["", "in asyncio"])
def test_sigterm_ends_a_run_in_order(
    ignored: bool,
    looping: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line, 143, and everything that is open is closed; `timeout` sends the signal twice."""
    closed = []

    async def steps() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
            await asyncio.Event().wait()
        finally:
            signal.raise_signal(signal.SIGTERM)
            await asyncio.sleep(0)
            closed.append(True)

    def run(config: Config) -> None:
        if looping:
            asyncio.run(steps())
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            closed.append(True)

    program(monkeypatch, "train", run)
    before = signal.getsignal(signal.SIGTERM)
    interrupt = signal.signal(
        signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler
    )
    try:
        assert main(["train", "run.name=mine"]) == 143
    finally:
        signal.signal(signal.SIGINT, interrupt)
    said = "rayrl: stopped by SIGTERM; the same command resumes from runs/mine\n"
    assert capsys.readouterr().err == said
    assert closed == [True]
    assert signal.getsignal(signal.SIGTERM) is before


def test_program_gets_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Config] = []
    program(monkeypatch, "train", seen.append)
    assert main(["train", "train.steps=3"]) == 0
    assert seen[0].train.steps == 3


def test_report_reads_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Config] = []
    program(monkeypatch, "report", seen.append)
    stored = to_dict(compose(["experiment=copyword", "train.groups=5"]))
    OmegaConf.save(OmegaConf.create(stored), tmp_path / "config.yaml")
    assert main(["report", str(tmp_path)]) == 0
    assert seen[0].run.dir == str(tmp_path)
    assert (seen[0].train.groups, len(seen[0].recipe)) == (5, 4)


def test_env_check_names_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Config] = []
    program(monkeypatch, "env", seen.append)
    assert main(["env", "check", "copyword"]) == 0
    assert main(["env", "check", "dir/my file.py"]) == 0
    assert [config.env.name for config in seen] == ["copyword", "dir/my file.py"]


# --- the program as people start it --------------------------------------------------------------


def started(*words: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """A command's result and the processor time it took: a busy machine does not count."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "rayrl", *words],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=CONF.parent,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("words", [["--help"], ["train", "train.step=3"], ["recipe", "--help"]])
def test_help_and_errors_come_at_once(words: list[str]) -> None:
    done, seconds = started(*words)
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "ray", "transformers", "deepspeed", "numpy"}
    assert seconds < 1.5
    assert done.returncode == (0 if "--help" in words else 2)


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {verb} " in out for verb in cli.VERBS)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_a_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    page = help_pages.PAGES[verb]
    for words in ([verb, "--help"], [verb, "-h"], ["help", verb], [verb, "some=thing", "--help"]):
        assert main(words) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"usage: rayrl {verb} ")
        assert max(map(len, out.splitlines())) <= 100
        keys = [key for key, _ in leaves() if key.split(".")[0] in page.sections]
        assert all(f"\n  {key}=" in out for key in keys)
        words_of_it = " ".join(out.split())
        for key in keys:
            found = settings()[key]
            assert found.meaning in words_of_it
            assert " | ".join(map(str, found.choices)) in words_of_it
        assert page.examples
        assert all(f"\n  rayrl {verb} {example}\n" in out for example in page.examples)


def test_examples_of_the_help_are_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for verb, page in help_pages.PAGES.items():
        for example in page.examples:
            understand([verb, *example.split()])


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    out = capsys.readouterr().out
    assert re.match(r"rayrl \d+\.\d+\S*, ray \S+, torch \S+, transformers \S+, Python 3\.", out)


def completed(line: str, script: str) -> set[str]:
    """What bash offers behind `line`."""
    words = line.replace("=", " = ").split() + ([""] if line.endswith((" ", "=")) else [])
    ask = (
        f"COMP_LINE={shlex.quote(line)} COMP_POINT={len(line)} COMP_CWORD={len(words) - 1} _rayrl; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", f"{script}\n{ask}"], capture_output=True, text=True, check=True, timeout=600
    )
    assert not done.stderr
    return {*done.stdout.split()}


def test_bash_completes_verbs_settings_and_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert completed("rayrl tr", script) == {"train"}
    assert {"train", "eval", "--version"} <= completed("rayrl ", script)
    assert completed("rayrl train train.gr", script) == {"train.groups=", "train.group_size="}
    assert completed("rayrl train algo=g", script) >= {"grpo", "gspo", "gigpo"}
    assert completed("rayrl train train.steps=5 env=tic", script) == {
        "tictactoe",
        "tictactoe_versus",
    }
    assert completed("rayrl train nothing.like", script) == set()


@pytest.mark.parametrize("shell", help_pages.SHELLS)
def test_scripts_of_all_shells(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"--completion={shell}"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("replay", "train.steps=", "experiment=tictactoe"))
    program = shutil.which(shell)
    if program:
        check = [program, "--no-execute"] if shell == "fish" else [program, "-n"]
        subprocess.run(check, input=out, text=True, check=True, timeout=600)


def test_no_such_shell(capsys: pytest.CaptureFixture[str]) -> None:
    assert "choose one of bash, zsh, fish" in error_of(capsys, "--completion", "tcsh")
    assert "choose one of bash, zsh, fish" in error_of(capsys, "--completion")


@pytest.mark.parametrize("verb", [verb for verb in cli.VERBS if verb not in ("report", "model")])
def test_a_script_that_calls_a_verb_is_told_what_makes_no_sense(verb: str) -> None:
    config = from_dict({"env": {"name": "tictactoe"}, "train": {"groups": 0}})
    run = importlib.import_module(cli.VERBS[verb][0]).run
    with pytest.raises(ConfigError, match=r"^train\.groups=0: must be 1 or more\.$"):
        run(config)


def test_every_verb_has_its_program() -> None:
    package = Path(cli.__file__).parent
    missing = [
        module
        for module, _ in cli.VERBS.values()
        if not (package.parent / f"{module.replace('.', '/')}.py").is_file()
    ]
    assert not missing


def test_plan_prints_what_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "experiment=copyword", "train.group_size=4"])
    out = capsys.readouterr().out
    assert "group_size: 4   (default 16)" in out
    assert "max_lag" not in out, "nobody has set it"
    assert "8 groups × 4 episodes = 32 episodes" in out
    assert "3. rl (train)\n       train.steps: 4" in out


def test_plan_prints_every_setting_where_asked(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--all", "train.group_size=4"])
    out = capsys.readouterr().out
    assert "  * group_size: 4   (default 16)" in out
    assert "    max_lag: 0\n" in out
    assert "only `rayrl plan --all` has" in error_of(capsys, "train", "--all")


def test_plan_names_what_will_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "cluster.replica_cpus=4096", "env.args.random_mix=1"]) == 1
    out, err = capsys.readouterr()
    assert "4096 cpus are reserved and this machine has" in out
    assert "env.args.random_mix" in out
    assert "will not fit" in err


def test_plan_shows_what_each_stage_reserves(capsys: pytest.CaptureFixture[str]) -> None:
    base = ["plan", "experiment=copyword", "cluster.replica_cpus=0.25", "cluster.learner_cpus=0.5"]
    stage = "recipe=[{name: a, verb: sft}, {name: b, verb: eval}, {name: c, verb: train, set: "
    main([*base, stage + "{cluster.replicas: 2}}, {name: d, verb: eval}]"])
    blocks = capsys.readouterr().out.split("\n\n")
    found = {block.split(" on ")[0]: block for block in blocks if block.startswith("Resources of ")}
    assert list(found) == [f"Resources of {names}" for names in ("a", "b, d", "c")]
    reserved = [block.splitlines()[-1].split()[1] for block in found.values()]
    assert reserved == ["0.5", "0.25", "1"]


def test_plan_says_what_each_stage_takes_of_memory(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "experiment=tictactoe"])
    blocks = capsys.readouterr().out.split("\n\n")
    lines = {
        block.split(" on ")[0].removeprefix("Resources of "): line.strip()
        for block in blocks
        for line in block.splitlines()
        if line.startswith("  memory")
    }
    (learning,) = (line for names, line in lines.items() if names == "rl1, rl2")
    whole, _, parts = learning.partition(": ")
    assert re.fullmatch(r"memory +up to about \d\.\d GiB", whole)
    names = [re.fullmatch(r"(.+?) \d\.\d", part) for part in parts.split(", ")]
    said = {found[1] for found in names if found}
    assert said == {"2 learners", "2 replicas", "env worker", "Ray and the driver"}
    assert "learner" not in lines["eval_teacher, eval_base, synth, eval_sft, eval_rl1, eval_rl2"]
    assert "replica" not in lines["sft"]


def test_plan_warns_of_more_memory_than_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    def warnings(*words: str) -> list[str]:
        main(["plan", "env=copyword", *words])
        return [line for line in capsys.readouterr().out.splitlines() if "may take" in line]

    assert not warnings()
    (said,) = warnings("learner.micro_batch_tokens=1000000000")
    assert re.match(r"  - training may take \d+\.\d GiB of memory, and this machine has \d", said)
    assert "lower learner.micro_batch_tokens" in said
    assert not warnings("learner.micro_batch_tokens=1000000000", "cluster.address=10.0.0.1:6379")


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ("engine=vllm", "engine=embedded needs no vLLM"),
        ("engine=vllm engine.speculative=ngram", None),  # the embedded engine cannot
        ("engine=vllm cluster.replica_gpus=1", None),
        ("engine=embedded", None),
        ("engine=embedded cluster.replica_gpus=1", "engine=vllm is recommended on GPUs"),
    ],
)
def test_plan_names_the_engine_that_is_recommended_where_another_was_chosen(
    words: str, advice: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["plan", "env=copyword", *words.split()])
    lines = [line for line in capsys.readouterr().out.splitlines() if "engine=" in line[:30]]
    assert [line.strip().startswith(advice or "") for line in lines] == [True] * bool(advice)


@pytest.mark.parametrize(
    ("verb", "words", "slow"),
    [
        ("train", "", True),
        ("eval", "", True),
        ("sft", "", True),
        ("eval", "engine=vllm", False),
        ("train", "engine=vllm", True),  # the learner
        ("train", "engine=vllm learner.dtype=bfloat16", False),
        ("train", "cluster.replica_gpus=1 cluster.learner_gpus=1", False),
    ],
)
def test_plan_says_where_a_compiler_would_help(
    verb: str,
    words: str,
    slow: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def said() -> list[str]:
        stage = f"recipe=[{{name: one, verb: {verb}}}]"
        main(["plan", "env=copyword", stage, *words.split()])
        return [line for line in capsys.readouterr().out.splitlines() if "  attention " in line]

    monkeypatch.setattr(plan, "missing", lambda: None)
    assert not said()
    monkeypatch.setattr(plan, "missing", lambda: "there is no C++ compiler (c++)")
    assert [("there is no C++ compiler" in line) for line in said()] == [True] * slow


@pytest.mark.parametrize(("most", "said"), [(0, "2 × 0 cpu"), (5, "2 (to 5 while groups wait) × ")])
def test_plan_says_how_many_env_workers_there_may_be(
    most: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["plan", "env=tictactoe", "cluster.env_workers=2", f"cluster.env_workers_max={most}"])
    assert f"env workers {said}" in capsys.readouterr().out


def test_plan_says_how_weights_travel_and_what_that_needs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def weights(*words: str) -> str:
        main(["plan", "env=copyword", *words])
        lines = capsys.readouterr().out.splitlines()
        return "\n".join(line for line in lines if "weights " in line or "object_store_gb=" in line)

    assert weights() == "  weights     by object_store"
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:6379")
    many = weights("cluster=multi_node", "engine=vllm", "learner=zero3", "learner.world_size=4")
    assert many == "  weights     by nccl, in buckets of 512 MiB"
    turns = weights("cluster=gpu_colocated", "engine=vllm")
    assert turns == "  weights     by object_store; replicas sleep while learners work"
    monkeypatch.setenv("RAY_ADDRESS", "local")
    # 900,224 parameters in fp32 and a header are 0.0034 GiB: twice that does not fit into 0.005
    said = weights("cluster.object_store_gb=0.005")
    assert "cluster.object_store_gb=0.005: two versions of the weights take 0.0 GiB" in said
    assert "object_store_gb=" not in weights("cluster.object_store_gb=0.01")


def test_plan_asks_this_machine_only_where_the_run_is_here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["plan", "experiment=copyword", "cluster.replica_cpus=4096"]
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:6379")
    assert main(command) == 0
    assert "on the cluster at elsewhere:6379\n" in capsys.readouterr().out
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert main(command) == 1


def test_plan_knows_who_wants_a_key(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    server = ["endpoint.url=http://x", "endpoint.model=m", "endpoint.api_key_env=MY_KEY"]
    words = ["plan", "env=tictactoe_versus", "env.seats.x=endpoint", *server]
    assert main(words) == 1
    assert "endpoint.api_key_env=MY_KEY: that variable is not set" in capsys.readouterr().out
    assert main([*words, "endpoint.api_key_env=''"]) == 0


def test_plan_says_that_nobody_would_be_trained(capsys: pytest.CaptureFixture[str]) -> None:
    versus = ["plan", "env=tictactoe_versus", "env.seats.x=player:optimal"]
    assert main(versus) == 0
    assert main([*versus, "env.seats.o=player:random"]) == 1
    assert "no seat of 'tictactoe_versus' is the policy" in capsys.readouterr().out


# --- names of other libraries -------------------------------------------------------------------


def test_a_name_of_another_library_is_understood() -> None:
    settings = dict(leaves())
    for name, ours in ELSEWHERE.items():
        assert ours in settings
        assert name not in settings
        for key in (name, f"trainer.{name}", f"actor_rollout_ref.actor.{name}"):
            with pytest.raises(ConfigError, match=f"{re.escape(ours)}'"):
                check_keys(nest({key: 1}))


def test_a_name_of_another_library_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    said = "num_generations: there is no such setting. Did you mean 'train.group_size'?"
    assert said in error_of(capsys, "train", "num_generations=8")


@pytest.mark.parametrize(
    ("word", "ours"),
    [
        ("--num_generations", "train.group_size"),
        ("--num-generations=8", "train.group_size"),
        ("--learning-rate", "learner.lr"),
        ("--train.stepz=3", "train.steps"),
        ("--beta", "algo.kl_coef"),
    ],
)
def test_options_of_other_libraries(
    word: str, ours: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = error_of(capsys, "train", word)
    assert f"Settings are written key=value; did you mean {ours!r}?" in error


def test_our_own_names_come_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Did you mean 'learner.lr'?" in error_of(capsys, "train", "optimizer.lr=1")
    assert "Did you mean 'algo.kl_coef'?" in error_of(capsys, "train", "algorithm.kl_coef=1")
    assert "Did you mean 'learner.betas'?" in error_of(capsys, "train", "learner.bettas=1")


# --- settings in short ---------------------------------------------------------------------------


SERVER = "endpoint=http://127.0.0.1:8000/v1"


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (
            [f"eval {SERVER} model=gpt-4.1"],
            {"endpoint.model": "gpt-4.1", "eval.player": "endpoint"},
        ),
        ([f"synth {SERVER} model=org/m"], {"endpoint.model": "org/m", "synth.player": "endpoint"}),
        ([f"play {SERVER} model=m"], {"endpoint.model": "m", "play.player": "endpoint"}),
        ([f"plan {SERVER} model=m"], {"endpoint.model": "m", "eval.player": "endpoint"}),
        (["eval model=runs/a/model"], {"model.path": "runs/a/model", "eval.player": "model"}),
        (["train model=runs/a/model"], {"model.path": "runs/a/model"}),
        # the policy is what is trained; a server may play another seat
        (
            [f"train {SERVER} endpoint.model=m model=./x", "env.seats.o=endpoint"],
            {"model.path": "./x", "endpoint.model": "m", "eval.player": "model"},
        ),
        (["eval model=./x", f"{SERVER} eval.player=model"], {"model.path": "./x"}),
        (
            ["eval model=m", "eval.player=endpoint endpoint.url=http://h/v1"],
            {"endpoint.model": "m", "model.path": "embedded"},
        ),
        (["eval model=pretrained model.path=./x"], {"model.path": "./x"}),
    ],
)
def test_endpoint_and_model_in_short(words: list[str], found: dict[str, str]) -> None:
    config = cli.configuration(cli.parse(" ".join(words).split()))
    keys = {key: getattr(getattr(config, key.split(".")[0]), key.split(".")[1]) for key in found}
    assert keys == found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("eval model=embeded", "Did you mean 'embedded'? There are: embedded, lfm2, pretrained"),
        ("eval endpont=http://h/v1 model=m", "Did you mean 'endpoint'?"),
        ("eval endpoint=h:8000 model=m", "endpoint.url=h:8000: eval.player=endpoint needs"),
        (f"eval {SERVER}", "endpoint.model=: eval.player=endpoint needs the name of a model"),
        (f"eval {SERVER} model=m endpoint.extra.stream=true", "endpoint.extra.stream=True"),
    ],
)
def test_what_is_short_and_wrong(
    capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    assert message in error_of(capsys, *words.split())


def test_plan_shows_what_short_settings_come_to(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "env=copyword", SERVER, "model=m", "endpoint.api_key_env=''"])
    out = capsys.readouterr().out
    assert 'url: "http://127.0.0.1:8000/v1"   (default "")' in out
    assert 'player: "endpoint"   (default "model")' in out


@pytest.mark.parametrize(
    "words", ["--version", "help", "train --help", "env list", "plan --all env=tictactoe"]
)
def test_output_that_nobody_reads_any_more_is_no_error(words: str) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "rayrl", *words.split()],
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, "")
