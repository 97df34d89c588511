"""Model of a cluster: which part limits it first as nodes are added, from measured costs.

    python benchmarks/simulate.py [--costs benchmarks/costs.json] [--picture scaling.png]
    python benchmarks/simulate.py --validate        predicted against measured, on this machine

The model is a closed queueing network with a fixed number of live episodes. A turn waits for the
engine and is served by *stations*: env worker, replica, engine, recorder, driver and the head
node's network; the servers of a station share its work evenly. Demands per turn are measured by
`costs.py` as functions of ids per turn, context length, turns per episode and requests per message.
Throughput is Schweitzer's approximate mean value analysis; `train.max_lag` determines how rollouts,
update and push add up to a step. Workload parameters that were not measured are marked ASSUMED.

The model omits failures, systematic differences in episode length, the file system, and Ray's own
processes on the head node, whose cost is per second and not per turn.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FULL = 0.5  # utilization at which waiting takes as long as service, and grows from there
PARTS = ("live", "rollouts", "overlap")
PUSHING = 0.1  # share of a step
PYTHON = ("cores", "env workers", "replicas' Python")  # where messages wait
LEAST_S, MOST_S, SHARE, PAUSE_S = 0.001, 0.02, 0.01, 0.01  # as rayrl.cluster.serving.streams


@dataclass(frozen=True)
class Station:
    """A part that serves turns.

    Attributes:
        demand_s: seconds of service per turn.
        servers: number of servers, which share the turns evenly.
    """

    name: str
    demand_s: float
    servers: int = 1

    @property
    def capacity(self) -> float:
        """Maximum turns per second."""
        return self.servers / self.demand_s if self.demand_s else math.inf


def solve(
    stations: Sequence[Station], live: float, wait_s: float
) -> tuple[float, dict[str, float]]:
    """Solve the network for `live` episodes that also wait `wait_s` per turn outside of it.

    Schweitzer's approximation of mean value analysis: an arriving episode finds the average queue
    without itself. It is exact for one episode, and for a single station.

    Returns:
        Turns per second, and mean number of episodes by station.
    """
    queue = {s.name: live / len(stations) for s in stations}
    rate = new = 0.0
    for _ in range(10_000):
        residence = {
            s.name: s.demand_s * (1 + queue[s.name] * max(live - 1, 0) / live / s.servers)
            for s in stations
        }
        new = live / (wait_s + sum(residence.values()))
        queue = {name: new * seconds for name, seconds in residence.items()}
        if abs(new - rate) <= 1e-7 * new:
            break
        rate = new
    return min(new, *(s.capacity for s in stations)), queue


@dataclass(frozen=True)
class Workload:
    """Rollouts and learning; quantities that grow with the cluster are per node.

    Attributes:
        turns: per episode; ids: sampled per turn; prompt: prompt ids added per turn.
        env_s: CPU seconds per turn of the environment's own code, on its env worker.
        tool_s: seconds per turn that something outside takes, without this cluster's CPU.
        engine_ids_s: ids per second of a full replica; step_s: of one id of one conversation.
        spread: standard deviation of a turn's time relative to its mean.
        episodes: per step and node; size: episodes per group.
        update_s: seconds of an update, with learners that grow with the nodes.
        model_gb: size of a push to every replica.
    """

    name: str
    turns: int
    ids: int
    prompt: int
    engine_ids_s: float
    step_s: float
    episodes: int
    update_s: float
    model_gb: float
    size: int = 16
    env_s: float = 0.0
    tool_s: float = 0.0
    spread: float = 0.3
    lag: int = 1


@dataclass(frozen=True)
class Cluster:
    """Resources, per node except the driver, the recorder and the head's network.

    Attributes:
        workers, replicas: per node.
        concurrency: live episodes per env worker.
        network_gb_s: per node.
        sync: object_store (every node fetches all weights from rank 0's node) or nccl (a chain).
        cores: shared by all processes, if cores are the limit; 0: each process has its own.
    """

    nodes: int
    workers: int
    replicas: int
    concurrency: int = 512
    network_gb_s: float = 12.5
    sync: str = "object_store"
    cores: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """Predicted performance.

    Attributes:
        busy: utilization by part.
        turns_s: turns per second of whole steps.
    """

    step_s: float
    play_s: float
    push_s: float
    turns_s: float
    busy: Mapping[str, float]

    @property
    def fullest(self) -> str:
        """The busiest part, which is the limit."""
        return max(self.busy, key=lambda name: self.busy[name])


def messages(rate: float, wait_s: float, live: float, spread_s: float) -> float:
    """Return messages per request between an env worker and a replica.

    Args:
        rate: requests per second between the two.
        wait_s: seconds a message waits for further requests.
        live: live episodes between them.
        spread_s: seconds over which the answers to one message spread.

    Requests that arrive at random share a message with rate * wait_s others. Answers within one
    wait share a message, and so do the requests that follow: a round of all live episodes takes at
    most one message per wait that it spreads over, and one more.
    """
    return min(1 / (1 + rate * wait_s), (1 + spread_s / wait_s) / live)


def pace(answer_s: float) -> float:
    """Return the seconds a message waits for further requests."""
    return min(max(SHARE * answer_s, LEAST_S), MOST_S)


def stations_of(
    costs: Mapping[str, Any],
    work: Workload,
    place: Cluster,
    rate: float,
    live: float,
    late_s: float = 0.0,
) -> tuple[list[Station], float]:
    """Return the stations at `rate` turns per second, and the seconds per turn outside of them.

    Args:
        live: live episodes.
        late_s: delay of messages in addition to their pace, because event loops are busy.
    """
    workers, replicas = place.nodes * place.workers, place.nodes * place.replicas
    answer_s = work.ids * work.step_s
    pairs = workers * replicas
    spread_s = math.sqrt(12) * work.spread * (answer_s + work.tool_s)  # if evenly
    calls = messages(rate / pairs, pace(answer_s) + late_s, max(live / pairs, 1.0), spread_s)
    context = (work.turns - 1) / 2 * (work.ids + work.prompt) + work.prompt  # on average
    wire = costs["wire"]["id"] * context
    worker, replica, batch = costs["hop env worker"], costs["hop replica"], costs["driver"]["batch"]
    groups = rate / work.turns / work.size
    driver = batch["turn"] + batch["id"] * work.ids + batch["episode"] / work.turns
    driver += costs["driver message"] / (1 + PAUSE_S * groups) / work.size / work.turns
    recorded = costs["recorder call"] / (1 + PAUSE_S * rate) + costs["recorder"]["turn"]
    kept = work.ids + work.prompt
    bytes_a_turn = 2 * (600 + 12 * work.ids + 3 * kept)  # to the recorder, and in the group
    engine = work.ids / work.engine_ids_s if work.engine_ids_s else 0.0
    at_worker = worker["request"] + worker["message"] * calls + work.env_s + wire
    at_replica = replica["request"] + replica["message"] * calls + wire
    slowdown = 1 + late_s / PAUSE_S  # periodic work, mostly sending, is delayed too
    steady = worker["second"] / slowdown, replica["second"] / slowdown
    if not place.cores:  # periodic work takes its share of a core
        at_worker /= 1 - steady[0]
        at_replica /= 1 - steady[1]
    stations = [
        Station("env workers", at_worker, workers),
        Station("replicas' Python", at_replica, replicas),
        Station("engines", engine, replicas),
        Station("recorder", recorded + 12e-6 * costs["put per MB"]["MB"] * work.ids),
        Station("driver", driver),
        Station("head's network", bytes_a_turn / (place.network_gb_s * 1e9)),
    ]
    wait_s = answer_s + work.tool_s + 2 * pace(answer_s)
    if place.cores:
        python = [s for s in stations if s.name not in ("engines", "head's network")]
        always = sum(costs["idle per second"].values())  # Ray itself
        always += workers * steady[0] + replicas * steady[1]
        left = max(place.cores - always, 0.1)
        shared = Station("cores", sum(s.demand_s for s in python) / left)
        engines = [s for s in stations if s.name == "engines" and s.demand_s]
        return [shared, *engines, *python], wait_s
    return stations, wait_s


def rate_of(costs: Mapping[str, Any], work: Workload, place: Cluster, live: float) -> float:
    """Predict the turns per second of `live` episodes.

    The cost of a turn depends on the requests per message, which depend on the rate and on the
    delay of the event loops: busy loops are late and therefore cheaper. Bisection between 0 and
    10 s finds the delay that is consistent with its cost.
    """
    early, late = 0.0, 10.0
    for _ in range(25):
        late_s = (early + late) / 2
        rate, queued_s = _served(costs, work, place, live, late_s)
        if queued_s > late_s:
            early = late_s
        else:
            late = late_s
    return rate


def _served(
    costs: Mapping[str, Any], work: Workload, place: Cluster, live: float, late_s: float
) -> tuple[float, float]:
    """Return turns per second at a message delay, and the resulting wait for Python."""
    rate = new = live / 10
    for _ in range(60):
        stations, wait_s = stations_of(costs, work, place, rate, live, late_s)
        shared = [s for s in stations if s.name in ("cores", "engines")]
        new, queue = solve(shared if place.cores else stations, live, wait_s)
        new = min(new, *(s.capacity for s in stations))  # no process is faster than a core
        if abs(new - rate) < 1e-4 * new:
            break
        rate = (rate + new) / 2
    loops = [s for s in stations if s.name in PYTHON and s.name in queue]
    queued_s = sum(queue[s.name] / new - s.demand_s for s in loops)
    return new, max(queued_s, 0.0) / 4  # a turn passes the worker's loop twice and the replica's


def push_of(costs: Mapping[str, Any], work: Workload, place: Cluster) -> float:
    """Predict the seconds of a push: buffer and checksum, network, replicas."""
    mb = 1000 * work.model_gb
    copy = costs["push"]["copy per MB"] * mb
    digest = costs["push"]["checksum per MB"] * mb / 8  # concurrent, 8 threads: ASSUMED
    others = place.nodes - 1
    hops = others if place.sync == "object_store" else min(others, 1)
    network = work.model_gb * hops / place.network_gb_s
    asked = costs["ask per replica"] * place.nodes * place.replicas
    return 2 * copy + digest + network + asked


def outcome(costs: Mapping[str, Any], work: Workload, place: Cluster) -> Outcome:
    """Predict a step in the steady state.

    With max_lag=0, rollouts, update and push are sequential. With more, groups of max_lag + 1 steps
    are live, so that an episode may take max_lag steps, and a step takes the maximum of: learning,
    rollouts at full speed, and the rollouts of one batch divided by max_lag.
    """
    episodes = work.episodes * place.nodes
    slots = place.nodes * place.workers * place.concurrency
    turns = episodes * work.turns
    live = min(episodes, slots)
    turn_s = work.ids * work.step_s + work.tool_s
    # the longest of them all: a sum of `turns` random times, of as many draws as are live
    tail = work.spread * turn_s * math.sqrt(2 * work.turns * math.log(max(live, 2)))
    alone = turns / rate_of(costs, work, place, live) + tail
    push = push_of(costs, work, place)
    if work.lag == 0:
        step = alone + work.update_s + push
    else:
        ahead = rate_of(costs, work, place, min((work.lag + 1) * episodes, slots))
        step = max(work.update_s + push, turns / ahead, alone / work.lag)
    rate = turns / step
    stations, _ = stations_of(costs, work, place, rate, live)
    busy = {s.name: rate * s.demand_s / s.servers for s in stations}
    busy |= {"learner": work.update_s / step, "push": push / step}
    return Outcome(step, alone, push, rate, busy)


# ---- the workloads of docs/cluster.md

WORKLOADS = [
    # The main job as RESULTS.md has it: 512 games of about 4 turns in 4.23 s on two cores, 53% of
    # it play, by two replicas; 12 sampled ids and 25 of prompt a turn. Network ASSUMED 10 Gbit/s.
    (
        Workload(
            "tic-tac-toe, embedded engine, CPU nodes",
            turns=4, ids=12, prompt=25, engine_ids_s=5500, step_s=0.004, episodes=512,
            update_s=1.93, model_gb=0.004, env_s=1.5e-5, lag=0,
        ),
        Cluster(1, workers=2, replicas=2, network_gb_s=1.25),
    ),
    # ASSUMED: nodes of 8 H100, 4 with vLLM (8,000 ids/s each, 10 ms an id) and 4 learning at 40% of
    # 990 TFLOP/s (6 FLOP a parameter and id); 100 Gbit/s between nodes.
    (
        Workload(
            "2.6B parameters on H100s",
            turns=4, ids=256, prompt=256, engine_ids_s=8000, step_s=0.010, episodes=256,
            update_s=5.2, model_gb=5.2,
        ),
        Cluster(1, workers=4, replicas=4),
    ),
    # ASSUMED: the same nodes and model; 50 turns of 200 ids, tools that take 2 s and answer 400
    # ids, so that contexts grow to 30,000; engines at 3,000 ids/s for it; 5 ms of the worker's CPU.
    (
        Workload(
            "2.6B parameters, 50 turns with tools",
            turns=50, ids=200, prompt=400, engine_ids_s=3000, step_s=0.010, episodes=128,
            update_s=38.0, model_gb=5.2, env_s=0.005, tool_s=2.0,
        ),
        Cluster(1, workers=4, replicas=4),
    ),
]  # fmt: skip
NODES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def table(costs: Mapping[str, Any], work: Workload, place: Cluster) -> list[Outcome]:
    """Print a line per number of nodes."""
    print(f"\n{work.name} (max_lag={work.lag}, cluster.sync={place.sync})")
    rows = [outcome(costs, work, replace(place, nodes=n)) for n in NODES]
    names = list(rows[0].busy)
    print(f"{'nodes':>5} {'turns/s':>9} {'step s':>7} {'scale':>6}", end=" ")
    print(*(f"{name:>16}" for name in names))
    for n, row in zip(NODES, rows, strict=True):
        scale = row.turns_s / rows[0].turns_s / n
        print(f"{n:>5} {row.turns_s:>9,.0f} {row.step_s:>7.2f} {scale:>6.0%}", end=" ")
        print(*(f"{row.busy[name]:>16.1%}" for name in names))
    grows = ("recorder", "driver", "head's network", "push")
    limits = [
        (n, name)
        for n, row in zip(NODES, rows, strict=True)
        for name in grows
        if row.busy[name] >= (PUSHING if name == "push" else FULL)
    ]
    first = f"{limits[0][1]} at {limits[0][0]} nodes" if limits else f"nothing up to {NODES[-1]}"
    print(f"first to limit of what does not grow with nodes: {first}")
    return rows


def picture(path: Path, found: Sequence[tuple[str, Sequence[Outcome]]]) -> None:
    """Plot the share of ideal scaling by number of nodes; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, rows in found:
        shares = [row.turns_s / rows[0].turns_s / n for n, row in zip(NODES, rows, strict=True)]
        axes.plot(NODES, shares, marker="o", label=name)
    axes.set(xscale="log", xticks=NODES, ylim=(0, 1.05), xlabel="nodes", ylabel="of ideal scaling")
    axes.set_xticklabels([str(n) for n in NODES])
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


# ---- predicted against measured


def fake(turns: int, latency: float, episodes: int, **more: Any) -> Workload:
    """Workload of the benchmarks' fake engine, which takes 0.5 to 1.5 times `latency`."""
    settings: dict[str, Any] = {"update_s": 0.0, "size": 16, "lag": 0} | more
    return Workload(
        "fake",
        turns=turns,
        ids=8,
        prompt=12,
        engine_ids_s=0.0,
        step_s=latency / 8,
        episodes=episodes,
        model_gb=0.0,
        spread=1 / math.sqrt(12),
        **settings,
    )


def validate(costs: Mapping[str, Any], parts: Sequence[str]) -> None:
    """Run the benchmarks and compare them with predictions for the cores they had."""
    import many_live  # in this folder
    import overlap
    import rollouts

    from rayrl.chat.renderer import Chat
    from rayrl.weights.model_dir import model_dir

    chat = Chat.load(str(model_dir("embedded")))

    print(f"{'what':<44} {'predicted':>10} {'measured':>10} {'error':>7}   cores")

    def line(what: str, predicted: float, measured: float, cores: float) -> None:
        print(
            f"{what:<44} {predicted:>10,.2f} {measured:>10,.2f} {predicted / measured - 1:>7.1%}"
            f"   {cores:.2f}",
            flush=True,
        )

    for live, latency in ((500, 1.0), (2000, 1.0), (10_000, 1.0)) if "live" in parts else ():
        args = argparse.Namespace(live=live, latency=latency, workers=2, seconds=16.0)
        found = asyncio.run(many_live.on_ray(args, chat))
        cores = found["available cores"]
        place = Cluster(1, workers=2, replicas=1, concurrency=live, cores=cores)
        work = fake(many_live.TURNS, latency, live)
        predicted = rate_of(costs, work, place, live)
        line(f"many_live, {live} live, {latency:g} s: turns/s", predicted, found["turns/s"], cores)
        print(json.dumps(found), flush=True)
    for live in (64, 256) if "rollouts" in parts else ():
        seconds, cores = asyncio.run(rollouts.on_ray(chat, "embedded", 1000, live, 2))
        place = Cluster(1, workers=1, replicas=1, cores=cores)
        predicted = rate_of(costs, fake(rollouts.TURNS, 0.0, 1000, size=1), place, live)
        measured = 1000 * rollouts.TURNS / seconds
        line(f"rollouts --ray, {live} live, instant: turns/s", predicted, measured, cores)
    if "overlap" in parts:
        options = argparse.Namespace(
            lags=[0, 1, 2], steps=9, latency=0.5, learn=4.0, groups=16, group_size=8
        )
        measured_steps = asyncio.run(overlap.measure(options))
        place = Cluster(1, workers=2, replicas=1, cores=2.0)
        for lag in options.lags:
            work = fake(overlap.TURNS, 0.5, 128, size=8, update_s=4.0, lag=lag)
            predicted = outcome(costs, work, place).step_s
            found_s = measured_steps[f"max_lag={lag}"]["seconds per step"]
            line(f"overlap, max_lag={lag}: seconds per step", predicted, found_s, 2.0)


def main() -> None:
    """Print the tables, or validate."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--costs", type=Path, default=HERE / "costs.json")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--validate", nargs="*", choices=PARTS, help="all of them, or some")
    args = parser.parse_args()
    costs = json.loads(args.costs.read_text())
    if args.validate is not None:
        validate(costs, args.validate or PARTS)
        return
    found = [(work.name, table(costs, work, place)) for work, place in WORKLOADS]
    print("\nchanges that move the limit:")
    work, place = WORKLOADS[0]
    table(costs, replace(work, lag=1), place)
    work, place = WORKLOADS[1]
    table(costs, work, replace(place, sync="nccl"))
    if args.picture:
        picture(args.picture, found)


if __name__ == "__main__":
    main()
