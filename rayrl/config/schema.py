"""Every setting, its default and what it means. YAML in `conf/` holds only differences."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "ALARM_ACTIONS",
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
    "Stage",
    "SynthConfig",
    "TrainConfig",
]


@dataclass(frozen=True)
class RunConfig:
    """Where a run keeps what it makes, and how it is reproduced."""

    dir: str = "runs/${run.name}"  # folder of config, metrics, episodes and checkpoints
    # names its folder, and its randomness in train; the command line's default is ENV-VERB
    name: str = "run"
    seed: int = 0  # everything random comes from it; in train together with the run's name
    keep_checkpoints: int = 2  # older ones are deleted; the last is always kept
    checkpoint_every: int = 10  # steps
    episodes_every: int = 10  # steps between batches whose episodes are written out
    # tensorboard | wandb | module:function | path/to/file.py:function : where metrics go besides
    # RUN/metrics.jsonl; a function is called with step and metrics
    loggers: list[str] = field(default_factory=lambda: ["tensorboard"])
    wandb_project: str = ""  # set to log to Weights & Biases as well


@dataclass(frozen=True)
class EnvConfig:
    """Which environment, with what settings, and what happens when its code fails."""

    name: str = ""  # entry point, path/to/file.py[:attribute] or module:attribute
    args: dict[str, Any] = field(default_factory=dict)  # keywords of the environment's task source
    rewards: dict[str, float] = field(default_factory=dict)  # overrides of reward weights
    # seat -> policy | player:NAME | model:PATH | endpoint; the policy where nothing is said
    seats: dict[str, str] = field(default_factory=dict)
    deadline_s: float = 120.0  # wall time for one episode
    # times an episode is played again after an infrastructure failure; a group that is still short
    # is then played once more as a whole
    retries: int = 2
    failure_budget: float = 0.05  # share of a step's episodes whose env code may fail
    # run each episode's env code in a child process that can be killed; at most 16 at once per
    # worker
    isolated: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """The model a stage starts from."""

    path: str = "embedded"  # the base that ships with rayrl; else a Hugging Face directory


@dataclass(frozen=True)
class EngineConfig:
    """What generates."""

    kind: str = "embedded"  # embedded | vllm
    max_live: int = 256  # conversations decoded at once by a replica
    max_len: int = 0  # ids of one conversation; 0: what the model's config allows
    kv_cache_gb: float = 1.0
    threads: int = 1  # torch threads of a replica
    dtype: str = "auto"  # vllm: auto (the model's own) | float32 | bfloat16 | float16
    gpu_memory: float = 0.9  # vllm: share of a GPU's memory that a replica may take
    on_update: str = "wait"  # vllm: wait | keep | abort : generations in flight at a weight push


@dataclass(frozen=True)
class SamplingConfig:
    """How models draw completions, in every seat; eval and play have temperatures of their own."""

    temperature: float = 1.0  # of train and synth
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 48
    stop: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class AlgoConfig:
    """Advantages and losses; sources in `learner/advantage.py` and `learner/loss.py`."""

    advantage: str = "grpo"  # grpo | rloo | gigpo | module:function | path/to/file.py:function
    normalize: str = "std"  # none | std | batch_std : what centred group rewards are divided by
    step_weight: float = 1.0  # gigpo: weight of the step-level advantage
    gamma: float = 0.95  # gigpo: discount from a turn to the end of its episode
    loss: str = "cispo"  # grpo | cispo | gspo | module:function | path/to/file.py:function
    loss_args: dict[str, Any] = field(default_factory=dict)  # keywords of a loss from outside
    aggregation: str = "token"  # token | sequence | constant: sampling.max_tokens
    clip_low: float = 0.2
    clip_high: float = 0.28
    cispo_max: float = 5.0  # upper bound of the CISPO importance weight
    entropy_coef: float = 0.0  # what a nat of the policy's entropy is worth; keeps it exploring
    kl_coef: float = 0.0
    kl_estimator: str = "k3"  # k1 | k2 | k3
    tis_max: float = 2.0  # truncated importance sampling of rollout against learner; 0 is off
    epochs: int = 1  # passes over a batch
    minibatches: int = 1  # optimizer steps a pass


@dataclass(frozen=True)
class LearnerConfig:
    """DeepSpeed and the optimizer."""

    kind: str = "deepspeed"  # deepspeed | reference (plain torch, one process)
    world_size: int = 1
    threads: int = 1  # torch threads of a rank
    zero_stage: int = 0
    # null: by the kind of model, 3e-4 for the base that ships with rayrl and others of its size,
    # 1e-5 for a pretrained one, 1e-4 for adapters on a pretrained one
    lr: float | None = None
    schedule: str = "constant"  # constant | linear | cosine
    warmup_steps: int = 0
    min_lr_ratio: float = 0.1  # of lr, at the end of a falling schedule
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    micro_batch_tokens: int = 8192  # distinct tokens a forward pass
    # float32 | bfloat16: of weights, activations and what is pushed; the optimizer's copy of the
    # weights, its moments and the sum of the gradients are fp32 in both
    dtype: str = "float32"
    # times the learner is started again from a checkpoint, after one of its processes died, before
    # the next checkpoint must be there
    restarts: int = 3
    gradient_checkpointing: bool = False  # compute activations twice instead of keeping them


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters instead of all weights; `learner/lora.py`."""

    rank: int = 0  # 0: all weights are trained
    alpha: float = 16.0  # the adapters' part is scaled by alpha / rank
    targets: list[str] = field(default_factory=lambda: ["all-linear"])  # layers' names


@dataclass(frozen=True)
class ClusterConfig:
    """Processes on Ray and where they go."""

    address: str = ""  # "" joins the cluster this runs in, or starts a local one
    env_workers: int = 1
    # so many, while groups wait for room on all of them; 0: as env_workers, a fixed number
    env_workers_max: int = 0
    env_worker_idle_s: float = 300.0  # without work, after which one above env_workers is let go
    concurrency: int = 512  # live episodes per worker
    env_worker_cpus: float = 0.0
    replicas: int = 1
    replica_cpus: float = 0.0
    replica_gpus: float = 0.0
    learner_cpus: float = 0.0
    learner_gpus: float = 0.0
    # custom resources of Ray's nodes, name -> amount, that each process reserves besides, so that
    # it goes to nodes that were started with them
    env_worker_resources: dict[str, float] = field(default_factory=dict)
    replica_resources: dict[str, float] = field(default_factory=dict)
    learner_resources: dict[str, float] = field(default_factory=dict)
    placement: str = "PACK"  # of the learners: PACK | SPREAD | STRICT_PACK | STRICT_SPREAD
    # auto | object_store | nccl | gloo | adapters : how weights reach the replicas; docs/cluster.md
    sync: str = "auto"
    bucket_mb: int = 256  # MiB of weights that are streamed at once (sync nccl and gloo)
    # each replica shares its GPU with a learner rank, and sleeps while that works
    colocate: bool = False
    object_store_gb: float = 0.5  # of a local Ray: two versions of the weights, and groups
    push_deadline_s: float = 60.0  # for every live replica to confirm new weights
    # pushes from one to the next after which replicas must also compute what the learner computes;
    # 0: after the first, and after the first to a replica that was started anew
    check_pushes: int = 0
    request_deadline_s: float = 60.0  # for one completion, from asking to its last id

    @property
    def most_env_workers(self) -> int:
        """Env workers there may be at once."""
        return max(self.env_workers, self.env_workers_max)


@dataclass(frozen=True)
class TrainConfig:
    """The reinforcement-learning loop."""

    steps: int = 100
    groups: int = 16  # tasks a step; one stratum of the task source each
    group_size: int = 16  # episodes per task
    # weights versions a token may be older than the learner's when it is trained on; 1 and more:
    # episodes are played while the learner works
    max_lag: int = 0


ALARM_ACTIONS = ("off", "log", "pause", "stop")


@dataclass(frozen=True)
class AlarmConfig:
    """What is out of bounds, for how long, and what happens then."""

    threshold: float
    patience: int = 1  # steps in a row out of bounds
    action: str = "log"  # off | log | pause (until RUN/PAUSED is removed) | stop (to be resumed)


@dataclass(frozen=True)
class AlarmsConfig:
    """What a training run watches in itself; `alarms.py` says what each one usually means."""

    mismatch: AlarmConfig = AlarmConfig(0.1)  # above: mean |logprob difference|, engine to learner
    entropy_floor: AlarmConfig = AlarmConfig(0.01, 3)  # below: nats per token
    entropy_share: AlarmConfig = AlarmConfig(0.1, 3)  # below: of the mean of the first 5 steps
    # above: distance of the mean reward, up or down, from that of the last `reward_window` steps,
    # in standard deviations of theirs
    reward_jump: AlarmConfig = AlarmConfig(5.0)
    reward_window: int = 20  # steps; at least half of them must be there to compare with
    kl: AlarmConfig = AlarmConfig(0.5, 3)  # above: nats per token from the reference (algo.kl_coef)
    # above: nats per token that the updates of a step moved
    step_kl: AlarmConfig = AlarmConfig(0.1)
    # above: share of groups without any advantage
    zero_variance_groups: AlarmConfig = AlarmConfig(0.9, 3)
    # above: share of the step that the learner waited for episodes
    starvation: AlarmConfig = AlarmConfig(0.95, 5)
    # above: share of the step that replicas had nothing to do; only where train.max_lag > 0
    idle_replicas: AlarmConfig = AlarmConfig(0.5, 5)


@dataclass(frozen=True)
class SftConfig:
    """Supervised fine-tuning on episodes."""

    data: str = ""  # JSONL written by synth
    steps: int = 100
    batch_size: int = 32  # episodes
    loss_on: str = "replies"  # replies | all


@dataclass(frozen=True)
class SynthConfig:
    """Playing a teacher and keeping its good games."""

    player: str = "teacher"  # a player of the environment, "model" (model.path) or "endpoint"
    episodes: int = 300
    keep: dict[str, float] = field(default_factory=dict)  # score name -> least value kept
    out: str = ""  # default: RUN/episodes.jsonl
    show: int = 3  # samples printed


@dataclass(frozen=True)
class EndpointConfig:
    """An OpenAI-compatible server."""

    url: str = ""  # https://host/v1
    model: str = ""
    api_key_env: str = "OPENAI_API_KEY"  # environment variable that holds the key; empty: none
    # limits of the whole run, however many env workers it has
    concurrency: int = 16  # requests, and live episodes, at once
    requests_per_minute: float = 0.0  # 0: as fast as it answers
    tokens_per_minute: float = 0.0  # read and written, as the server counts them; 0: no limit
    max_tokens_total: int = 0  # eval and synth stop, to be resumed, when these are spent; 0: never
    timeout_s: float = 60.0  # one request
    retries: int = 4  # of a request, with growing waits
    extra: dict[str, Any] = field(default_factory=dict)  # keys of a request's body; null leaves out
    price_in: float = 0.0  # of a million tokens read, cached ones as well
    price_out: float = 0.0  # of a million tokens written


@dataclass(frozen=True)
class EvalConfig:
    """Playing without learning."""

    player: str = "model"  # model (model.path) | endpoint | a player of the environment
    episodes: int = 400  # per cell
    temperature: float = 0.0
    cells: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> env.args of that cell
    exhaustive: bool = True  # run the environment's own exhaustive check, if it has one


@dataclass(frozen=True)
class FetchConfig:
    """`rayrl model fetch NAME [FOLDER]`."""

    name: str = ""  # of a model rayrl knows where to find, e.g. smollm2-135m
    out: str = ""  # folder; default: models/NAME


@dataclass(frozen=True)
class PlayConfig:
    """Playing in a terminal."""

    player: str = "model"  # as eval.player: who plays the seats that nobody else does
    seat: str = ""  # seat of the environment that the person takes; empty: only watch
    form: str = ""  # the reply sent for what the person types, {}; empty: the environment's own
    episodes: int = 1
    temperature: float = 0.0  # of models


@dataclass(frozen=True)
class ReplayConfig:
    """`rayrl replay FILE [EPISODE_ID]`."""

    file: str = ""  # JSONL of episodes
    episode: str = ""  # id of the only one to be replayed; empty: all
    out: str = ""  # where they are written with today's scores; empty: nowhere
    show: int = 3  # differences of texts printed


@dataclass(frozen=True)
class ServeConfig:
    """The OpenAI-compatible HTTP server."""

    host: str = "127.0.0.1"  # 0.0.0.0: reachable from other machines
    port: int = 8000  # 0: any that is free
    model_name: str = ""  # what clients call the model; empty: its folder's name
    api_key_env: str = ""  # environment variable that holds the key clients must send; empty: none
    max_requests: int = 256  # answered at once by a replica; one more gets a 503


@dataclass(frozen=True)
class Stage:
    """One step of a recipe: a verb, and the settings it differs in."""

    name: str = "???"
    verb: str = "???"  # synth | sft | train | eval
    set: dict[str, Any] = field(default_factory=dict)  # dotted key -> value


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
    recipe: list[Stage] = field(default_factory=list)
