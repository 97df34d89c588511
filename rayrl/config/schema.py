"""Every setting: its default, meaning and range. YAML in `conf/` holds only differences."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rayrl.config.setting import Setting, setting

__all__ = [
    "AlarmConfig",
    "AlarmsConfig",
    "AlgoConfig",
    "ClusterConfig",
    "Config",
    "EndpointConfig",
    "EngineConfig",
    "EnvConfig",
    "EvalConfig",
    "FetchConfig",
    "LearnerConfig",
    "LoraConfig",
    "ModelConfig",
    "PlayConfig",
    "ReplayConfig",
    "RunConfig",
    "SamplingConfig",
    "ServeConfig",
    "SftConfig",
    "ShareAlarmConfig",
    "Stage",
    "SynthConfig",
    "TrainConfig",
]


class _DefaultDir(str):
    """A run folder that follows the run's name; `dataclasses.replace` passes it on as such."""

    __slots__ = ()


@dataclass(frozen=True)
class RunConfig:
    """Where a run keeps what it makes, and how it is reproduced.

    `dir` is runs/NAME unless another folder is given: `RunConfig(name="a").dir == "runs/a"`. A
    default folder follows the name: with `dataclasses.replace(run, name="b")` it is "runs/b"; any
    other is kept. To give a run the default folder of another one, pass `str(other.dir)`.
    """

    dir: str = setting(
        "", "folder of the run: settings, metrics, episodes and checkpoints; empty: runs/NAME"
    )
    name: str = setting(
        "run",
        "name of the run: names its folder and, with run.seed, fixes what train draws at random; "
        "the command line's default is ENV-VERB",
    )
    seed: int = setting(0, "seed of everything random; train combines it with run.name")
    keep_checkpoints: int = setting(
        2, "newest checkpoints to keep; older ones are deleted", least=1
    )
    checkpoint_every: int = setting(10, "steps between checkpoints", least=1)
    episodes_every: int = setting(
        10, "steps between batches whose episodes are written out", least=1
    )
    loggers: list[str] = setting(
        ["tensorboard"],
        "where metrics go besides RUN/metrics.jsonl: tensorboard, wandb, or a function of step and "
        "metrics as module:function or path/to/file.py:function",
    )
    keep_best: str = setting(
        "",
        "metric of the evaluations (eval.every), as eval/win, whose best model is kept in "
        "RUN/model_best; better is what the lower bound of the paired difference says; empty: none",
    )
    wandb_project: str = setting(
        "", "Weights & Biases project to log to as well; empty: do not log there"
    )

    def __post_init__(self) -> None:
        default = _DefaultDir(f"runs/{self.name}")
        if self.dir in ("", default) or isinstance(self.dir, _DefaultDir):
            object.__setattr__(self, "dir", default)


@dataclass(frozen=True)
class EnvConfig:
    """Which environment, with what settings, and what happens when its code fails."""

    name: str = setting(
        "",
        "environment: an installed name, path/to/file.py[:attribute], module:attribute, or data "
        "whose rows are tasks, as path/to/rows.jsonl or hf:OWNER/NAME of the Hugging Face hub",
    )
    mix: dict[str, dict[str, Any]] = setting(
        {},
        "several environments instead of env.name: name -> its name (as env.name), weight, args, "
        "rewards, seats, held_out, max_tokens, stop, cells",
    )
    mix_by: str = setting(
        "episodes",
        "what the weights in env.mix are shares of: episodes, or tokens that the policy writes",
        choices=("episodes", "tokens"),
    )
    args: dict[str, Any] = setting(
        {}, "keyword arguments of the environment's task source; of data: what its columns mean"
    )
    rewards: dict[str, float] = setting({}, "reward weights that replace the environment's own")
    held_out: float = setting(
        0.1,
        "share of a sequence of tasks that evaluation plays and training does not see, unless the "
        "environment has eval_tasks; 0: both play all of them",
        least=0,
        most=1,
    )
    duplicates: str = setting(
        "refuse",
        "what becomes of a row of data that is both in training and in evaluation: the run does "
        "not start, or training goes without it",
        choices=("refuse", "drop"),
    )
    seats: dict[str, str] = setting(
        {},
        "who plays each seat: policy, endpoint, player:NAME, model:PATH, rllib:CHECKPOINT, "
        "module:function or path/to/file.py:function; seats left out are played by the policy",
    )
    deadline_s: float = setting(120.0, "seconds of wall time an episode may take", above=0)
    retries: int = setting(
        2,
        "times an episode is played again after an infrastructure failure; a group that is still "
        "short is then played once more as a whole",
        least=0,
    )
    failure_budget: float = setting(
        0.05,
        "share of a step's episodes whose environment code may fail before the run stops",
        least=0,
        most=1,
    )
    isolated: bool = setting(
        False,
        "run each episode's environment code in a child process that can be killed; at most 16 at "
        "once per worker",
    )


@dataclass(frozen=True)
class ModelConfig:
    """The model a stage starts from."""

    path: str = setting(
        "embedded", "Hugging Face directory, or embedded: the base model that ships with rayrl"
    )


@dataclass(frozen=True)
class EngineConfig:
    """What generates."""

    kind: str = setting("embedded", "what generates", choices=("embedded", "vllm"))
    max_live: int = setting(256, "conversations that a replica decodes at once", least=1)
    max_len: int = setting(
        0, "longest conversation in tokens; 0: as long as the model's config allows", least=0
    )
    kv_cache_gb: float = setting(
        1.0, "GB of KV cache per replica; vLLM on a GPU uses engine.gpu_memory instead", above=0
    )
    threads: int = setting(1, "torch threads per replica", least=1)
    device: str = setting(
        "auto",
        "embedded: what a replica computes on; auto: the GPU that Ray gives it "
        "(cluster.replica_gpus), else the CPU",
        choices=("auto", "cpu", "cuda"),
    )
    dtype: str = setting(
        "auto",
        "number format of weights and activations; auto: float32 (embedded), or the model's own "
        "(vLLM); the embedded engine knows float32 and bfloat16",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    gpu_memory: float = setting(
        0.9, "vLLM: share of a GPU's memory that a replica may use", above=0, most=1
    )
    on_update: str = setting(
        "wait",
        "vLLM: what generations in flight do when new weights come: finish on the old ones, go on "
        "with the new ones, or start again",
        choices=("wait", "keep", "abort"),
    )
    speculative: str = setting(
        "none",
        "vLLM: guess the next tokens from what followed the last ones before, in the conversation "
        "(ngram) or in earlier replies too (suffix), and check the guesses in one pass",
        choices=("none", "ngram", "suffix"),
    )
    draft_tokens: int = setting(
        4, "vLLM: tokens that engine.speculative guesses at once", least=1, most=64
    )


@dataclass(frozen=True)
class SamplingConfig:
    """How models draw completions, in every seat; eval and play have their own temperature."""

    temperature: float = setting(1.0, "sampling temperature of train and synth", least=0)
    top_p: float = setting(
        1.0,
        "sample from the most likely tokens that together have this probability; 1: from all",
        above=0,
        most=1,
    )
    top_k: int = setting(0, "sample from this many of the most likely tokens; 0: from all", least=0)
    max_tokens: int = setting(48, "longest completion in tokens", least=1)
    stop: list[str] = setting([], "strings that end a completion")


@dataclass(frozen=True)
class AlgoConfig:
    """Advantages and losses; sources in `learner/advantage.py` and `learner/loss.py`."""

    advantage: str = setting(
        "grpo",
        "how episodes of a group are compared",
        choices=("grpo", "rloo", "gigpo"),
        open=True,
    )
    normalize: str = setting(
        "std",
        "what centred rewards are divided by: nothing, the group's standard deviation or the "
        "batch's",
        choices=("none", "std", "batch_std"),
    )
    step_weight: float = setting(1.0, "gigpo: weight of the step-level advantage", least=0)
    gamma: float = setting(
        0.95, "gigpo: discount per turn from a turn to the end of its episode", least=0, most=1
    )
    loss: str = setting("cispo", "policy loss", choices=("grpo", "cispo", "gspo"), open=True)
    loss_args: dict[str, Any] = setting({}, "keyword arguments of a loss from outside the package")
    aggregation: str = setting(
        "token",
        "how the loss is averaged: over tokens, over rows, or as if each row had "
        "sampling.max_tokens tokens",
        choices=("token", "sequence", "constant"),
    )
    clip_low: float = setting(
        0.2, "grpo, gspo: importance ratios are clipped below at 1 - clip_low", least=0, most=1
    )
    clip_high: float = setting(
        0.28, "grpo, gspo: importance ratios are clipped above at 1 + clip_high", least=0
    )
    cispo_max: float = setting(5.0, "cispo: upper bound of the importance weight", least=1)
    entropy_coef: float = setting(
        0.0,
        "coefficient of an entropy bonus, per nat, which keeps the policy exploring; 0: none",
        least=0,
    )
    kl_coef: float = setting(
        0.0, "coefficient of a KL penalty against the starting model; 0: none", least=0
    )
    kl_estimator: str = setting("k3", "estimator of that KL", choices=("k1", "k2", "k3"))
    tis_max: float = setting(
        2.0,
        "upper bound of the importance weights that correct for rollout logprobs differing from "
        "the learner's (truncated importance sampling); 0: no correction",
        least=0,
    )
    epochs: int = setting(1, "passes over each batch", least=1)
    minibatches: int = setting(1, "optimizer steps per pass", least=1)


@dataclass(frozen=True)
class LearnerConfig:
    """DeepSpeed and the optimizer."""

    kind: str = setting(
        "deepspeed",
        "what learns; reference: plain torch in one process",
        choices=("deepspeed", "reference"),
    )
    world_size: int = setting(1, "learner ranks", least=1)
    threads: int = setting(1, "torch threads per rank", least=1)
    zero_stage: int = setting(0, "DeepSpeed ZeRO stage", choices=(0, 1, 2, 3))
    lr: float | None = setting(
        None,
        "learning rate; null: by the kind of model, 3e-4 for the base that ships with rayrl and "
        "others of its size, 1e-5 for a pretrained one, 1e-4 for adapters on a pretrained one",
        above=0,
    )
    schedule: str = setting(
        "constant", "learning rate after the warm-up", choices=("constant", "linear", "cosine")
    )
    warmup_steps: int = setting(0, "steps over which the learning rate rises linearly", least=0)
    min_lr_ratio: float = setting(
        0.1,
        "final learning rate of a falling schedule, as a share of learner.lr",
        least=0,
        most=1,
    )
    betas: list[float] = setting([0.9, 0.95], "AdamW's two decay rates, each in [0, 1)")
    eps: float = setting(1e-8, "AdamW's epsilon", above=0)
    weight_decay: float = setting(0.0, "AdamW's weight decay", least=0)
    max_grad_norm: float = setting(1.0, "norm to which gradients are clipped", above=0)
    micro_batch_tokens: int | None = setting(
        None,
        "distinct tokens per forward pass; null: 1024 for a pretrained model on a CPU, where more "
        "are hardly faster and take more memory, else 8192",
        least=1,
    )
    dtype: str = setting(
        "float32",
        "number format of weights, activations and pushed weights; the optimizer's copy of the "
        "weights, its moments and the gradients' sum are always fp32",
        choices=("float32", "bfloat16"),
    )
    restarts: int = setting(
        3,
        "times the learner is restarted from a checkpoint, after one of its processes died, before "
        "it must reach the next checkpoint",
        least=0,
    )
    gradient_checkpointing: bool = setting(
        False, "recompute activations in the backward pass instead of storing them"
    )


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters instead of all weights; `learner/lora.py`."""

    rank: int = setting(0, "rank of the adapters; 0: train all weights", least=0)
    alpha: float = setting(16.0, "the adapters' output is scaled by alpha / rank", above=0)
    targets: list[str] = setting(["all-linear"], "names of the layers that get adapters")


@dataclass(frozen=True)
class ClusterConfig:
    """Processes on Ray and where they go."""

    address: str = setting(
        "", "address of a Ray cluster; empty: the one this runs in, else a new local one"
    )
    env_workers: int = setting(1, "env workers that are always there", least=1)
    env_workers_max: int = setting(
        0,
        "most env workers there may be while groups wait for a free one; 0: cluster.env_workers, a "
        "fixed number",
        least=0,
    )
    env_worker_idle_s: float = setting(
        300.0,
        "idle seconds after which a worker above cluster.env_workers is stopped",
        above=0,
    )
    concurrency: int = setting(512, "live episodes per env worker", least=1)
    env_worker_cpus: float = setting(0.0, "CPUs that Ray reserves per env worker", least=0)
    replicas: int = setting(1, "replicas of each model that plays", least=1)
    replica_cpus: float = setting(0.0, "CPUs that Ray reserves per replica", least=0)
    replica_gpus: float = setting(0.0, "GPUs that Ray reserves per replica", least=0)
    learner_cpus: float = setting(0.0, "CPUs that Ray reserves per learner rank", least=0)
    learner_gpus: float = setting(0.0, "GPUs that Ray reserves per learner rank", least=0)
    env_worker_resources: dict[str, float] = setting(
        {},
        "custom Ray resources, name -> amount, that each env worker reserves; it runs only on "
        "nodes started with them",
        above=0,
    )
    replica_resources: dict[str, float] = setting(
        {}, "custom Ray resources that each replica reserves", above=0
    )
    learner_resources: dict[str, float] = setting(
        {}, "custom Ray resources that each learner rank reserves", above=0
    )
    placement: str = setting(
        "PACK",
        "Ray's placement strategy for the learner ranks",
        choices=("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"),
    )
    sync: str = setting(
        "auto",
        "how weights reach the replicas; docs/cluster.md explains each way",
        choices=("auto", "object_store", "nccl", "gloo", "adapters"),
    )
    bucket_mb: int = setting(256, "MiB of weights broadcast at once (sync nccl and gloo)", least=1)
    colocate: bool = setting(
        False,
        "replicas share their GPUs, or memory, with learner ranks and sleep while those work",
    )
    fork_workers: bool = setting(
        True,
        "fork a local Ray's workers from one process that has imported torch: a run starts in less "
        "time and memory (Linux)",
    )
    object_store_gb: float = setting(
        0.5,
        "GiB of object store of a local Ray; it holds two versions of the weights, and groups",
        above=0,
    )
    push_deadline_s: float = setting(
        60.0, "seconds within which every live replica must confirm new weights", above=0
    )
    check_pushes: int = setting(
        0,
        "pushes between checks that replicas compute what the learner computes; 0: check only the "
        "first push, and the first to a replacement replica",
        least=0,
    )
    request_deadline_s: float = setting(
        60.0, "seconds a completion may take, from the request to its last token", above=0
    )

    @property
    def most_env_workers(self) -> int:
        """Env workers there may be at once."""
        return max(self.env_workers, self.env_workers_max)


@dataclass(frozen=True)
class TrainConfig:
    """The reinforcement-learning loop."""

    steps: int = setting(100, "training steps", least=0)
    groups: int = setting(16, "tasks per step, one from each stratum of the task source", least=1)
    group_size: int = setting(16, "episodes per task", least=1)
    max_lag: int = setting(
        0,
        "weights versions that a token may be behind the learner when it is trained on; from 1 on, "
        "episodes are played while the learner works",
        least=0,
    )
    refill: float = setting(
        1.0,
        "groups that a step may play, in multiples of train.groups: those without spread in their "
        "rewards, which teach nothing, are replaced; 1: none is",
        least=1,
    )
    task_sampling: str = setting(
        "uniform",
        "how tasks are drawn; difficulty: more of those whose groups recently differed in their "
        "rewards; replay: those that went worst are played again",
        choices=("uniform", "difficulty", "replay"),
    )
    uniform_share: float = setting(
        0.25,
        "task_sampling=difficulty or replay: share of the groups that are drawn uniformly all the "
        "same; they notice what has changed, and the metrics reward and score/* are over them",
        above=0,
        most=1,
    )
    pools: int = setting(
        16,
        "task_sampling=difficulty: strata of a task function whose groups are looked at together; "
        "of a sequence of tasks each is looked at by itself",
        least=2,
    )
    stop_when: str = setting(
        "",
        "end early, with the model, once the evaluations (eval.every) say so, as "
        "'eval/win >= 0.97 for 2': twice in a row; or 'eval/win not improved for 3': three since "
        "the best one, as run.keep_best judges it; empty: never",
    )


@dataclass(frozen=True)
class AlarmConfig:
    """A bound, how long it must be crossed, and what happens then."""

    threshold: float = field(metadata={"setting": Setting("the bound", least=0)})
    patience: int = setting(1, "steps in a row out of bounds that raise the alarm", least=1)
    action: str = setting(
        "log",
        "what happens then; pause: until RUN/PAUSED is removed; stop: to be resumed",
        choices=("off", "log", "pause", "stop"),
    )


@dataclass(frozen=True)
class ShareAlarmConfig(AlarmConfig):
    """An alarm whose threshold is a share."""

    threshold: float = field(metadata={"setting": Setting("the bound", least=0, most=1)})


@dataclass(frozen=True)
class AlarmsConfig:
    """What a training run watches in itself; `run/alarms.py` says what each alarm usually means."""

    mismatch: AlarmConfig = setting(
        AlarmConfig(0.1),
        "upper bound on the mean absolute difference of rollout and learner logprobs",
    )
    entropy_floor: AlarmConfig = setting(
        AlarmConfig(0.01, 3), "lower bound on the policy's entropy, in nats per token"
    )
    entropy_share: ShareAlarmConfig = setting(
        ShareAlarmConfig(0.1, 3),
        "lower bound on the policy's entropy, as a share of its mean over the first 5 steps",
    )
    reward_jump: AlarmConfig = setting(
        AlarmConfig(5.0),
        "upper bound on the distance, up or down, of the mean reward from its mean over the last "
        "alarms.reward_window steps, in standard deviations of theirs",
    )
    reward_window: int = setting(
        20,
        "steps that alarms.reward_jump compares with; at least half of them must have been run",
        least=2,
    )
    kl: AlarmConfig = setting(
        AlarmConfig(0.5, 3),
        "upper bound on the KL from the reference, in nats per token, if algo.kl_coef > 0",
    )
    step_kl: AlarmConfig = setting(
        AlarmConfig(0.1), "upper bound on the KL that a step's updates add, in nats per token"
    )
    zero_variance_groups: ShareAlarmConfig = setting(
        ShareAlarmConfig(0.9, 3), "upper bound on the share of groups without any advantage"
    )
    starvation: ShareAlarmConfig = setting(
        ShareAlarmConfig(0.95, 5),
        "upper bound on the share of the step that the learner waited for episodes",
    )
    idle_replicas: ShareAlarmConfig = setting(
        ShareAlarmConfig(0.5, 5),
        "upper bound on the share of the step that replicas were idle, if train.max_lag > 0",
    )


@dataclass(frozen=True)
class SftConfig:
    """Supervised fine-tuning on episodes or chats."""

    data: str = setting(
        "",
        "JSONL of episodes, as synth writes it, or data whose column messages has chats: .jsonl, "
        ".json, .parquet or a saved data set",
    )
    steps: int = setting(100, "training steps", least=0)
    batch_size: int = setting(32, "conversations per step", least=1)
    loss_on: str = setting(
        "replies",
        "take the loss on the model's replies only, or on all that was said",
        choices=("replies", "all"),
    )
    stop_when: str = setting("", "end early, as train.stop_when; empty: never")


@dataclass(frozen=True)
class SynthConfig:
    """Playing a teacher and keeping its good games."""

    player: str = setting(
        "teacher",
        "who plays: a player of the environment, model (model.path), endpoint, rllib:CHECKPOINT, "
        "module:function or path/to/file.py:function",
    )
    episodes: int = setting(300, "episodes to play", least=1)
    keep: dict[str, float] = setting({}, "score name -> least value of an episode that is kept")
    out: str = setting("", "file of the kept episodes; empty: RUN/episodes.jsonl")
    show: int = setting(3, "kept episodes to print as samples", least=0)


@dataclass(frozen=True)
class EndpointConfig:
    """An OpenAI-compatible server; its limits are the whole run's, however many env workers."""

    url: str = setting("", "address of the server, as https://host/v1")
    model: str = setting("", "the server's name of the model")
    api_key_env: str = setting(
        "OPENAI_API_KEY", "environment variable with the API key; empty: no key"
    )
    concurrency: int = setting(16, "requests in flight, and live episodes, at once", least=1)
    requests_per_minute: float = setting(0.0, "rate limit of requests; 0: none", least=0)
    tokens_per_minute: float = setting(
        0.0,
        "rate limit of prompt and completion tokens, as the server counts them; 0: none",
        least=0,
    )
    max_tokens_total: int = setting(
        0, "token budget after which eval and synth stop, to be resumed; 0: none", least=0
    )
    timeout_s: float = setting(60.0, "seconds one request may take", above=0)
    retries: int = setting(4, "times a request is retried, with growing waits", least=0)
    extra: dict[str, Any] = setting(
        {}, "further keys of each request's body; null leaves a key out"
    )
    price_in: float = setting(
        0.0, "price of a million prompt tokens, cached ones included", least=0
    )
    price_out: float = setting(0.0, "price of a million completion tokens", least=0)


@dataclass(frozen=True)
class EvalConfig:
    """Playing without learning."""

    player: str = setting(
        "model",
        "who plays: model (model.path), endpoint, a player of the environment, rllib:CHECKPOINT, "
        "module:function or path/to/file.py:function",
    )
    episodes: int = setting(400, "episodes per cell", least=1)
    samples: int = setting(
        1, "episodes of each task, which eval.episodes must be a multiple of; for pass@k", least=1
    )
    every: int = setting(
        0, "train, sft: steps between evaluations, and one after the last; 0: none", least=0
    )
    at_start: bool = setting(True, "if eval.every > 0, evaluate before the first step too")
    temperature: float = setting(0.0, "sampling temperature; 0: greedy", least=0)
    cells: dict[str, dict[str, Any]] = setting(
        {}, "rows of the table: cell name -> env.args of that cell"
    )
    exhaustive: bool = setting(True, "if greedy, also run the environment's exhaustive checks")


@dataclass(frozen=True)
class FetchConfig:
    """`rayrl model fetch NAME [FOLDER]`."""

    name: str = setting("", "a model that rayrl knows where to find, as smollm2-135m")
    out: str = setting("", "folder to write; empty: models/NAME")


@dataclass(frozen=True)
class PlayConfig:
    """Playing in a terminal."""

    player: str = setting(
        "model", "who plays the seats that nobody else takes; values as for eval.player"
    )
    component: str = setting("", "the environment of a mixture (env.mix) that is played")
    seat: str = setting("", "the environment's seat that you take; empty: only watch")
    form: str = setting(
        "", "reply sent for what you type, which replaces {}; empty: the environment's own form"
    )
    episodes: int = setting(1, "episodes to play", least=1)
    temperature: float = setting(0.0, "sampling temperature of models; 0: greedy", least=0)


@dataclass(frozen=True)
class ReplayConfig:
    """`rayrl replay FILE [EPISODE_ID]`."""

    file: str = setting("", "JSONL of episodes")
    episode: str = setting("", "id of the one episode to replay; empty: all")
    out: str = setting("", "file for the episodes with today's scores; empty: do not write")
    show: int = setting(3, "text differences to print", least=0)


@dataclass(frozen=True)
class ServeConfig:
    """The OpenAI-compatible HTTP server."""

    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0: reachable from other machines")
    port: int = setting(8000, "port to listen on; 0: any free one", least=0, most=65535)
    model_name: str = setting("", "the model's name for clients; empty: its folder's name")
    api_key_env: str = setting(
        "", "environment variable with the key that clients must send; empty: no key"
    )
    max_requests: int = setting(
        256, "requests a replica answers at once; further ones get a 503", least=1
    )


@dataclass(frozen=True)
class Stage:
    """One step of a recipe: a verb, and the settings it differs in."""

    name: str = setting("???", "names the stage's folder in the run's")
    verb: str = setting("???", "what runs", choices=("synth", "sft", "train", "eval"))
    set: dict[str, Any] = setting({}, "dotted key -> value, over the recipe's settings")


@dataclass(frozen=True)
class Config:
    """The whole configuration."""

    run: RunConfig = field(default_factory=RunConfig)
    env: EnvConfig = field(default_factory=EnvConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    algo: AlgoConfig = field(default_factory=AlgoConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    alarms: AlarmsConfig = field(default_factory=AlarmsConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    synth: SynthConfig = field(default_factory=SynthConfig)
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    fetch: FetchConfig = field(default_factory=FetchConfig)
    play: PlayConfig = field(default_factory=PlayConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    recipe: list[Stage] = setting([], "stages that `rayrl recipe` runs in this order")
