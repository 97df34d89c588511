"""What every verb refuses before anything is started, `rayrl plan` in the same words; and that a
start which fails leaves nothing behind."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, NoReturn

import pytest

from rayrl import cli, loop
from rayrl.cluster import session
from rayrl.commands import evaluate, sft, synth
from rayrl.commands.folder_names import WRITING
from rayrl.config import Config
from rayrl.errors import ConfigError, InfraError
from rayrl.run import training
from rayrl.run.folder import RunDir
from rayrl.run.progress_bar import ProgressBar
from rayrl.run.training import Recovery
from tests.documents import ROOT, commands, settings

SERVER = "endpoint.url=https://host/v1 endpoint.model=m endpoint.api_key_env=NO_SUCH_KEY"
TINY = f"env.name={ROOT}/tests/cluster_envs.py:talk"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*words: object, **more: object) -> NoReturn:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(session.ray, "init", start)


def without(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """As if these were not installed."""
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in modules else found(name)
    )


@pytest.mark.parametrize(
    ("verb", "words", "said"),
    [
        ("sft", "sft.data=nowhere.jsonl", "sft.data=nowhere.jsonl: there is no such file"),
        ("train", "run.wandb_project=p", "run.wandb_project=p: wandb is not installed"),
        ("sft", "sft.data=pyproject.toml run.wandb_project=p", "wandb is not installed"),
        ("train", "algo.loss=mine.py:loss", "algo.loss='mine.py': there is no file"),
        ("train", "algo.advantage=os:pth", "algo.advantage='os:pth': os has no function 'pth'"),
        ("train", "lora.rank=4", "lora.rank=4: peft is not installed"),
        ("train", "engine=vllm", "engine.kind=vllm: vLLM is not installed"),
        ("eval", "engine=vllm", "engine.kind=vllm: vLLM is not installed"),
        ("serve", "engine=vllm", "engine.kind=vllm: vLLM is not installed"),
        (
            "eval",
            "engine=vllm engine.speculative=suffix",
            "speculative=suffix: arctic-inference is",
        ),
        ("eval", f"eval.player=endpoint {SERVER}", "endpoint.api_key_env=NO_SUCH_KEY: that var"),
        ("synth", f"synth.player=endpoint {SERVER}", "endpoint.api_key_env=NO_SUCH_KEY: that var"),
        ("play", f"play.player=endpoint {SERVER}", "endpoint.api_key_env=NO_SUCH_KEY: that var"),
        ("train", f"env=tictactoe_versus env.seats.o=endpoint {SERVER}", "NO_SUCH_KEY: that var"),
        ("train", "model.path=nowhere", "model.path=nowhere: "),
        ("eval", "env.seats.agent=model:nowhere", "model.path=nowhere: "),
        ("serve", "model.path=nowhere", "model.path=nowhere: "),
        ("train", "env.name=tictacto", "env.name='tictacto': no such environment"),
        ("eval", "env.args.random_mix=1", "env.args.random_mix"),
        ("eval", "eval.cells={a:{random_mix:1}}", "eval.cells.a: env.args.random_mix"),
        (
            "train",
            "eval.every=2 eval.cells={a:{random_mix:1}}",
            "eval.cells.a: env.args.random_mix",
        ),
        ("train", "env.seats.agnt=policy", "env.seats.agnt: 'tictactoe' has no such seat. Did you"),
        ("train", "env.seats.agent=player:teacher", "no seat of 'tictactoe' is the policy"),
        ("synth", "synth.player=techer", "Did you mean 'teacher'"),
        ("synth", "synth.player=techer", "synth.player='techer' is not one of optimal, random"),
        ("eval", "eval.player=player:optimel", "Did you mean 'player:optimal'"),
        ("eval", "eval.player=mine.py:best", "eval.player='mine.py': there is no file"),
        ("eval", "eval.player=random:randon", "random has no function 'randon'. Did you mean"),
        ("eval", "env.seats.agent=random:BPF", "env.seats.agent='random:BPF' is "),
        ("eval", "eval.player=object:gone", "eval.player='object:gone' is an object that"),
        ("eval", "env.seats.agent=plyer:optimal", "Did you mean 'player'"),
        ("train", "cluster.replica_cpus=4096", "4096 cpus are reserved and this machine has"),
        ("serve", "cluster.replica_gpus=64", "64 gpus are reserved and this machine has"),
        ("train", "sampling.max_tokens=100000", "sampling.max_tokens=100000: the model at"),
    ],
)
@pytest.mark.usefixtures("no_ray")
def test_what_is_not_there_is_said_before_ray_starts(
    verb: str,
    words: str,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without(monkeypatch, "wandb", "peft", "vllm", "arctic_inference")
    Path("pyproject.toml").touch()
    assert cli.main([verb, *words.split()]) == 2
    assert said in capsys.readouterr().err
    assert not Path("runs").exists()
    if verb in WRITING:
        recipe = f"recipe=[{{name: a, verb: {verb}}}]"
        assert cli.main(["plan", *words.split(), recipe]) == 1
        assert said in capsys.readouterr().out
        assert cli.main(["recipe", *words.split(), recipe]) == 2
        assert said in capsys.readouterr().err
        assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("synth", "cluster.replica_cpus=4096 model.path=nowhere engine=vllm"),  # nobody generates
        ("sft", "sft.data=pyproject.toml engine=vllm sampling.max_tokens=100000"),
        ("eval", "eval.player=optimal model.path=nowhere lora.rank=4 run.wandb_project=p"),
        ("eval", "eval.player=endpoint endpoint.url=http://127.0.0.1:1/v1 endpoint.model=m"),
        ("serve", "env.name=nowhere"),
        ("sft", "sft.data=pyproject.toml env.name=nowhere"),
    ],
)
def test_what_a_verb_does_not_need_need_not_be_there(
    verb: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rayrl.run.start_check import check_start

    without(monkeypatch, "wandb", "peft", "vllm")
    Path("pyproject.toml").touch()
    check_start(cli.configuration(cli.parse([verb, *words.split()])), verb)


def test_a_recipe_needs_only_what_it_does_not_make() -> None:
    from rayrl.run.start_check import check_start

    recipe = (
        "recipe=[{name: teach, verb: synth, set: {synth.out: kept.jsonl}},"
        "{name: learn, verb: sft, set: {sft.data: kept.jsonl}},"
        "{name: seen, verb: eval, set: {model.path: runs/r/learn/model}},"
        "{name: asked, verb: eval, set: {eval.player: endpoint, endpoint.url: 'https://h/v1',"
        "endpoint.model: m}}]"
    )
    config = cli.configuration(cli.parse(["recipe", "run.name=r", recipe]))
    with pytest.raises(ConfigError, match=r"^endpoint\.api_key_env=OPENAI_API_KEY: that"):
        check_start(config, "recipe")
    check_start(config, "recipe", done=["asked"])


@pytest.mark.parametrize(("steps", "refused"), [(4, False), (9, True)])
def test_a_run_with_nothing_left_to_do_needs_nothing(steps: int, refused: bool) -> None:
    from rayrl.run.start_check import check_start

    Path("runs/r").mkdir(parents=True)
    Path("runs/r/result.json").write_text('{"steps": 4}')
    words = ["train", "run.name=r", f"train.steps={steps}", "model.path=nowhere"]
    config = cli.configuration(cli.parse(words))
    if refused:
        with pytest.raises(ConfigError, match=r"model\.path=nowhere"):
            check_start(config, "train")
    else:
        check_start(config, "train")


OPENS: dict[str, tuple[Any, str, Callable[[Config], None]]] = {
    "synth": (synth, "open_rollouts", synth.run),
    "sft": (sft, "open_learners", sft.run),
    "train": (training, "open_cluster", loop.run),
    "eval": (evaluate, "open_rollouts", evaluate.run),
}


@pytest.mark.parametrize("verb", OPENS)
def test_a_start_that_fails_leaves_nothing(
    verb: str, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, opens, run = OPENS[verb]

    class Failing(AbstractAsyncContextManager[None]):
        def __init__(self, *words: object, **more: object) -> None:
            """As what it stands for."""

        async def __aenter__(self) -> NoReturn:
            raise InfraError("a replica cannot start")

        async def __aexit__(self, *error: object) -> None:
            raise AssertionError("it was never open")

    monkeypatch.setattr(module, opens, Failing)
    words = [
        TINY,
        "synth.player=parrot",
        f"model.path={tiny}",
        "engine.max_len=256",
        "sampling.max_tokens=8",
    ]
    if verb == "sft":
        words.append(f"sft.data={ROOT / 'tests' / 'nowhere.jsonl'}")
        monkeypatch.setattr(sft, "load_rows", lambda *given: [])
        monkeypatch.setattr(sft, "check_start", lambda *given: None)
    config = cli.configuration(cli.parse([verb, *words]))
    with pytest.raises(InfraError, match="cannot start"):
        run(config)
    assert not Path("runs").exists()


def test_the_real_error_comes_before_that_of_an_older_folder(
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = Path("runs/tictactoe-sft")
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("learner: {lr: 1.0}\nsft: {data: older.jsonl}\n")
    (folder / "metrics.jsonl").write_text('{"step": 0}\n')
    assert cli.main(["sft", "sft.data=nowhere.jsonl"]) == 2
    assert "sft.data=nowhere.jsonl: there is no such file" in capsys.readouterr().err


# --- the folder's name ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        ("train env=tictactoe", "runs/tictactoe-train"),
        ("synth env=tictactoe", "runs/tictactoe-synth"),
        ("sft env.name=addition.py sft.data=x", "runs/addition-sft"),
        ("sft env.name=./some/addition.py:sums sft.data=x", "runs/addition-sums-sft"),
        ("train env.name=./data/sums.jsonl", "runs/sums-train"),
        ("train env.name=./data/train/", "runs/train-train"),
        ("sft env.name='' sft.data=chats.jsonl", "runs/chats-sft"),
        ("train env.name=package.module:env", "runs/package.module-env-train"),
        ("eval env=tictactoe", "runs/tictactoe-eval"),
        ("eval env=tictactoe eval.player=optimal", "runs/tictactoe-eval-optimal"),
        ("eval env=tictactoe model=runs/tictactoe-sft/model", "runs/tictactoe-eval-sft"),
        ("eval env=tictactoe model=runs/a/rl1/model", "runs/tictactoe-eval-rl1"),
        ("eval env=tictactoe endpoint=http://h/v1 model=org/m", "runs/tictactoe-eval-org-m"),
        ("train env=tictactoe run.name=mine", "runs/mine"),
        ("train env=tictactoe run.name=run", "runs/run"),
        ("train env=tictactoe run.dir=/data/x", "/data/x"),
        ("recipe experiment=tictactoe", "runs/tictactoe"),
        ("train experiment=tictactoe", "runs/tictactoe-train"),
        ("eval experiment=tictactoe eval.player=optimal", "runs/tictactoe-eval-optimal"),
        ("plan env=tictactoe", "runs/tictactoe-train"),
        ("plan experiment=tictactoe", "runs/tictactoe"),
    ],
)
def test_the_folder_follows_from_verb_and_environment(words: str, folder: str) -> None:
    config = cli.configuration(cli.parse(words.split()))
    assert config.run.dir == folder
    if words.startswith("train experiment"):  # its randomness is the recipe's
        assert config.run.name == "tictactoe"


def test_commands_of_the_readme_do_not_share_folders() -> None:
    blocks = [("bash", text) for text in (ROOT / "README.md").read_text().split("```bash")[1:]]
    lines = settings(commands([(kind, text.split("```")[0]) for kind, text in blocks]))
    folders = [
        cli.configuration(cli.parse(words)).run.dir
        for words, _ in lines
        if words and words[0] in (*WRITING, "recipe")
    ]
    own = [one for one in folders if one != "runs/tictactoe"]
    assert len(own) >= 5
    assert len({*own}) == len(own), own


# --- what is said when a run goes on, or has nothing left to do ----------------------------------


class Learner:
    """Loads what it is given."""

    def __init__(self) -> None:
        self.loaded: list[str] = []

    async def load(self, path: Path) -> None:
        self.loaded.append(path.name)


async def test_a_resumed_run_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    config = cli.configuration(cli.parse(["train", "run.name=r", "train.steps=12"]))
    with RunDir(config.run.dir, config) as folder:
        with folder.checkpoint(10):
            pass
        learner, steps = Learner(), list[int]()

        with ProgressBar("r", 12) as bar:
            recovery = Recovery(learner, folder, bar, 0)  # type: ignore[arg-type]
            async for attempt in recovery.attempts():
                steps += range(attempt.start, 12)
    assert (learner.loaded, steps) == (["step_000010"], [10, 11])
    assert "resumed at step 10\n" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["sft", "train"])
def test_a_finished_run_says_so(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [verb, "run.name=r", "sft.data=gone.jsonl", f"{verb}.steps=4"]
    config = cli.configuration(cli.parse(words))
    with RunDir(config.run.dir, config) as folder:
        folder.finish({"steps": 4})
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "runs/r: already finished" in out
    assert "Model in runs/r/model" in out
