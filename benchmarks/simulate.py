"""A cluster on paper: which part of it is full first as nodes are added, from measured costs.

    python benchmarks/simulate.py [--costs benchmarks/costs.json] [--picture scaling.png]
    python benchmarks/simulate.py --validate        predicted against measured, on this machine

A closed queueing network: a fixed number of live episodes go round; a turn waits for the engine and
is served by the env worker's process, the replica's process, the engine, the recorder, the driver
and the head node's network (*stations*; a station of several servers gets its work evenly). Demands
a turn are those `costs.py` measured, as functions of ids a turn, length of context, turns an
episode and requests a message. Throughput is Schweitzer's approximate mean value analysis; a step
is then what `train.max_lag` makes of play, update and push. Figures of a workload that nobody
measured here are marked ASSUMED where they stand.

What it leaves out: failures, episodes of unequal length other than by chance, the file system, and
Ray's own processes on the head node, which cost a second and not a turn.
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
FULL = 0.5  # of its time a part is busy: who comes waits as long as he is served, and ever longer
PARTS = ("live", "rollouts", "overlap")
PUSHING = 0.1  # of a step
PYTHON = ("cores", "env workers", "replicas' Python")  # where messages wait
LEAST_S, MOST_S, SHARE, PAUSE_S = 0.001, 0.02, 0.01, 0.01  # as rayrl.cluster.serving.streams


@dataclass(frozen=True)
class Station:
    """Something that serves.

    Attributes:
        demand_s: seconds of service a turn needs.
        servers: each gets its share of the turns.
    """

    name: str
    demand_s: float
    servers: int = 1

    @property
    def most(self) -> float:
        """Turns a second."""
        return self.servers / self.demand_s if self.demand_s else math.inf


def solve(
    stations: Sequence[Station], live: float, wait_s: float
) -> tuple[float, dict[str, float]]:
    """Turns a second of `live` episodes that wait `wait_s` a turn besides; and who is where.

    Schweitzer's approximation of mean value analysis: who arrives finds what is there on average,
    less himself. Exact for one customer, and where one station is all there is.

    Returns:
        Turns a second, and episodes at each station by its name.
    """
    queue = {s.name: live / len(stations) for s in stations}
    rate = new = 0.0
    for _ in range(10_000):
        there = {
            s.name: s.demand_s * (1 + queue[s.name] * max(live - 1, 0) / live / s.servers)
            for s in stations
        }
        new = live / (wait_s + sum(there.values()))
        queue = {name: new * seconds for name, seconds in there.items()}
        if abs(new - rate) <= 1e-7 * new:
            break
        rate = new
    return min(new, *(s.most for s in stations)), queue


@dataclass(frozen=True)
class Workload:
    """What is played and learned, a node where it grows with the cluster.

    Attributes:
        turns: of an episode; ids: sampled in one; prompt: ids added before it.
        env_s: CPU seconds a turn of the environment's own code, on its host.
        tool_s: seconds a turn that something outside takes, without this cluster's CPU.
        engine_ids_s: ids a second of a full replica; step_s: of one id of one conversation.
        spread: standard deviation of a turn's time, as a share of it.
        episodes: a step and a node; size: of a group.
        update_s: of the learner for its batch, with learners that grow with the nodes.
        model_gb: that a push brings to every replica.
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
    """Where. Everything a node, but for the driver, the recorder and the head's network.

    Attributes:
        hosts, replicas: a node.
        concurrency: live episodes a host.
        network_gb_s: of a node.
        sync: object_store (every node fetches the whole from rank 0's node) or nccl (a chain).
        cores: that all processes share, where that is what limits; 0: each has its own.
    """

    nodes: int
    hosts: int
    replicas: int
    concurrency: int = 512
    network_gb_s: float = 12.5
    sync: str = "object_store"
    cores: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What comes of it.

    Attributes:
        busy: share of its time each part is busy.
        turns_s: turns a second of whole steps.
    """

    step_s: float
    play_s: float
    push_s: float
    turns_s: float
    busy: Mapping[str, float]

    @property
    def fullest(self) -> str:
        """What limits: the busiest part."""
        return max(self.busy, key=lambda name: self.busy[name])


def messages(rate: float, wait_s: float, live: float, spread_s: float) -> float:
    """Messages a request between a host and a replica.

    Args:
        rate: requests a second between the two.
        wait_s: that a message waits for company.
        live: episodes that go round between them.
        spread_s: over which answers to requests that travelled together spread.

    Requests that come at random find 1 + rate * wait_s in a message. Answers that come within a
    wait travel together, and so do the requests that follow: a round of all who are live is no more
    messages than waits that it spreads over, and one.
    """
    return min(1 / (1 + rate * wait_s), (1 + spread_s / wait_s) / live)


def pace(answer_s: float) -> float:
    """Seconds that a message waits for company."""
    return min(max(SHARE * answer_s, LEAST_S), MOST_S)


def stations_of(
    costs: Mapping[str, Any],
    work: Workload,
    place: Cluster,
    rate: float,
    live: float,
    late_s: float = 0.0,
) -> tuple[list[Station], float]:
    """Every part's demand at `rate` turns a second, and seconds a turn that nothing serves.

    Args:
        live: episodes.
        late_s: that a message waits besides its pace, because its event loop is busy.
    """
    hosts, replicas = place.nodes * place.hosts, place.nodes * place.replicas
    answer_s = work.ids * work.step_s
    pairs = hosts * replicas
    spread_s = math.sqrt(12) * work.spread * (answer_s + work.tool_s)  # if evenly
    calls = messages(rate / pairs, pace(answer_s) + late_s, max(live / pairs, 1.0), spread_s)
    context = (work.turns - 1) / 2 * (work.ids + work.prompt) + work.prompt  # on average
    wire = costs["wire"]["id"] * context
    host, replica, batch = costs["hop host"], costs["hop replica"], costs["driver"]["batch"]
    groups = rate / work.turns / work.size
    driver = batch["turn"] + batch["id"] * work.ids + batch["episode"] / work.turns
    driver += costs["driver message"] / (1 + PAUSE_S * groups) / work.size / work.turns
    told = costs["recorder call"] / (1 + PAUSE_S * rate) + costs["recorder"]["turn"]
    kept = work.ids + work.prompt
    bytes_a_turn = 2 * (600 + 12 * work.ids + 3 * kept)  # to the recorder, and in the group
    engine = work.ids / work.engine_ids_s if work.engine_ids_s else 0.0
    at_host = host["request"] + host["message"] * calls + work.env_s + wire
    at_replica = replica["request"] + replica["message"] * calls + wire
    seldom = 1 + late_s / PAUSE_S  # what they do every so often, mostly telling, is late as well
    steady = host["second"] / seldom, replica["second"] / seldom
    if not place.cores:  # it leaves the rest of a core
        at_host /= 1 - steady[0]
        at_replica /= 1 - steady[1]
    stations = [
        Station("env workers", at_host, hosts),
        Station("replicas' Python", at_replica, replicas),
        Station("engines", engine, replicas),
        Station("recorder", told + 12e-6 * costs["put a MB"]["MB"] * work.ids),
        Station("driver", driver),
        Station("head's network", bytes_a_turn / (place.network_gb_s * 1e9)),
    ]
    wait_s = answer_s + work.tool_s + 2 * pace(answer_s)
    if place.cores:
        python = [s for s in stations if s.name not in ("engines", "head's network")]
        always = sum(costs["idle a second"].values())  # Ray itself
        always += hosts * steady[0] + replicas * steady[1]
        left = max(place.cores - always, 0.1)
        shared = Station("cores", sum(s.demand_s for s in python) / left)
        engines = [s for s in stations if s.name == "engines" and s.demand_s]
        return [shared, *engines, *python], wait_s
    return stations, wait_s


def rate_of(costs: Mapping[str, Any], work: Workload, place: Cluster, live: float) -> float:
    """Turns a second that `live` episodes make.

    What a turn costs depends on how many travel in a message, and that on the rate and on how late
    the event loops are: a busy one is late and therefore cheaper. So the loops are as late as makes
    the two agree; found by bisection between not at all and 10 s.
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
    """Turns a second if messages are that late, and how long a message waits for Python then."""
    rate = new = live / 10
    for _ in range(60):
        stations, wait_s = stations_of(costs, work, place, rate, live, late_s)
        shared = [s for s in stations if s.name in ("cores", "engines")]
        new, queue = solve(shared if place.cores else stations, live, wait_s)
        new = min(new, *(s.most for s in stations))  # no process is faster than a core
        if abs(new - rate) < 1e-4 * new:
            break
        rate = (rate + new) / 2
    loops = [s for s in stations if s.name in PYTHON and s.name in queue]
    queued_s = sum(queue[s.name] / new - s.demand_s for s in loops)
    return new, max(queued_s, 0.0) / 4  # a turn passes the host's loop twice and the replica's


def push_of(costs: Mapping[str, Any], work: Workload, place: Cluster) -> float:
    """Seconds: into a buffer with its checksum, over the network, into the replicas."""
    mb = 1000 * work.model_gb
    copy = costs["push"]["copy a MB"] * mb
    digest = costs["push"]["checksum a MB"] * mb / 8  # beside the copy, and over 8 threads: ASSUMED
    others = place.nodes - 1
    hops = others if place.sync == "object_store" else min(others, 1)
    network = work.model_gb * hops / place.network_gb_s
    asked = costs["ask a replica"] * place.nodes * place.replicas
    return 2 * copy + digest + network + asked


def outcome(costs: Mapping[str, Any], work: Workload, place: Cluster) -> Outcome:
    """A step in the steady state.

    With max_lag=0 play, update and push follow each other. With more, groups of max_lag + 1 steps
    are live, so that an episode has max_lag steps' time to end, and the slowest of three wins:
    learning, playing at full speed, and the time of one batch's play over max_lag.
    """
    episodes = work.episodes * place.nodes
    slots = place.nodes * place.hosts * place.concurrency
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
        Cluster(1, hosts=2, replicas=2, network_gb_s=1.25),
    ),
    # ASSUMED: nodes of 8 H100, 4 with vLLM (8,000 ids/s each, 10 ms an id) and 4 learning at 40% of
    # 990 TFLOP/s (6 FLOP a parameter and id); 100 Gbit/s between nodes.
    (
        Workload(
            "2.6B parameters on H100s",
            turns=4, ids=256, prompt=256, engine_ids_s=8000, step_s=0.010, episodes=256,
            update_s=5.2, model_gb=5.2,
        ),
        Cluster(1, hosts=4, replicas=4),
    ),
    # ASSUMED: the same nodes and model; 50 turns of 200 ids, tools that take 2 s and answer 400
    # ids, so that contexts grow to 30,000; engines at 3,000 ids/s for it; 5 ms of the host's CPU.
    (
        Workload(
            "2.6B parameters, 50 turns with tools",
            turns=50, ids=200, prompt=400, engine_ids_s=3000, step_s=0.010, episodes=128,
            update_s=38.0, model_gb=5.2, env_s=0.005, tool_s=2.0,
        ),
        Cluster(1, hosts=4, replicas=4),
    ),
]  # fmt: skip
NODES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def table(costs: Mapping[str, Any], work: Workload, place: Cluster) -> list[Outcome]:
    """Print a line for each number of nodes."""
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
    """Share of ideal scaling by number of nodes. Needs matplotlib, which rayrl does not."""
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
    """The benchmarks' fake engine: no work of its own, half to one and a half of `latency`."""
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
    """Run the benchmarks and print what the model says of them, with the cores they got."""
    import many_live  # beside this file
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
        args = argparse.Namespace(live=live, latency=latency, hosts=2, seconds=16.0)
        found = asyncio.run(many_live.on_ray(args, chat))
        cores = found["cores there"]
        place = Cluster(1, hosts=2, replicas=1, concurrency=live, cores=cores)
        work = fake(many_live.TURNS, latency, live)
        predicted = rate_of(costs, work, place, live)
        line(f"many_live, {live} live, {latency:g} s: turns/s", predicted, found["turns/s"], cores)
        print(json.dumps(found), flush=True)
    for live in (64, 256) if "rollouts" in parts else ():
        seconds, cores = asyncio.run(rollouts.on_ray(chat, "embedded", 1000, live, 2))
        place = Cluster(1, hosts=1, replicas=1, cores=cores)
        predicted = rate_of(costs, fake(rollouts.TURNS, 0.0, 1000, size=1), place, live)
        measured = 1000 * rollouts.TURNS / seconds
        line(f"rollouts --ray, {live} live, instant: turns/s", predicted, measured, cores)
    if "overlap" in parts:
        options = argparse.Namespace(
            lags=[0, 1, 2], steps=9, latency=0.5, learn=4.0, groups=16, group_size=8
        )
        measured_steps = asyncio.run(overlap.measure(options))
        place = Cluster(1, hosts=2, replicas=1, cores=2.0)
        for lag in options.lags:
            work = fake(overlap.TURNS, 0.5, 128, size=8, update_s=4.0, lag=lag)
            predicted = outcome(costs, work, place).step_s
            found_s = measured_steps[f"max_lag={lag}"]["seconds a step"]
            line(f"overlap, max_lag={lag}: seconds a step", predicted, found_s, 2.0)


def main() -> None:
    """The tables, or the validation."""
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
    print("\nwhat moves the limit:")
    work, place = WORKLOADS[0]
    table(costs, replace(work, lag=1), place)
    work, place = WORKLOADS[1]
    table(costs, work, replace(place, sync="nccl"))
    if args.picture:
        picture(args.picture, found)


if __name__ == "__main__":
    main()
