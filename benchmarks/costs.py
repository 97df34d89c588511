"""CPU seconds of turns, episodes, calls and pushes in each process.

    python benchmarks/costs.py [--out costs.json] [--workers 1 4]

CPU time, unlike wall time, grows only slightly with other load on the machine. Each cost is a fit
over several sizes (turns per episode, ids per turn, requests in flight, megabytes), printed with
its error at a size that was held out. `simulate.py` predicts from these fits:

- *driver*: an arrived episode through group log, advantages, batch and pickling of its shard, per
  episode, turn and sampled id; episode files separately, because runs may write them rarely;
- *env worker*: rollouts with an environment that does nothing and with tic-tac-toe;
- *hop*: env worker, replica, recorder and Ray's own processes around an engine that computes
  nothing, per request and per message, from runs with few and with many episodes in flight;
- *store*, *push*: storing, checking and copying weights, per MB; calling every replica.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import pickle
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accounts import Accounts  # in this folder
from fake_engine import FakeEngine, counts_of

import rayrl
from rayrl import Agent, Sampling, Scores, Task
from rayrl.chat.renderer import Chat
from rayrl.cluster.serving.streams import PAUSE_S
from rayrl.config import AlgoConfig, from_dict
from rayrl.engine.protocol import Engine
from rayrl.learner.advantage import advantages
from rayrl.learner.batch import make_batch
from rayrl.rollout.episode_io import episode_to_json
from rayrl.rollout.players import PolicyPlayer
from rayrl.rollout.records import turn_to_bytes
from rayrl.rollout.resume import TurnLog
from rayrl.rollout.rollout import GroupPlan, play_groups
from rayrl.run.group_log import GroupLog, Played
from rayrl.types import Episode, Group, Request, Turn, VersionSpan, user
from rayrl.weights.flat import checksum
from rayrl.weights.model_dir import model_dir

HERE = Path(__file__).resolve()
TURNS = 4
SIZE = 8  # episodes per group when measuring hops
REPLY = "<move>4</move>"


@rayrl.env(tasks=[Task()], rewards={"turns": 1.0})
async def chatter(task: Task, agent: Agent) -> Scores:
    """Four turns, whatever the replies."""
    for k in range(TURNS):
        await agent(f"turn {k}: your move")
    return {"turns": float(agent.turns)}


# ---- in one process


def cpu_of(work: Callable[[], object], at_least_s: float = 0.3) -> float:
    """Measure the CPU seconds of one call, the minimum of three rounds."""
    work()
    rounds = []
    for _ in range(3):
        n, began = 0, time.process_time()
        while (spent := time.process_time() - began) < at_least_s / 3:
            work()
            n += 1
        rounds.append(spent / n)
    return min(rounds)


def make_group(name: str, size: int, turns: int, ids: int) -> Group:
    """Make a group as env workers send it, with `ids` prompt ids and sampled ids per turn."""

    def turn(k: int) -> Turn:
        return Turn(
            seat="agent",
            prompt=(user(f"turn {k}: your move"),),
            text="x" * ids,
            finish="stop",
            offset=2 * ids * k,
            prompt_ids=tuple(range(1000, 1000 + ids)),
            completion_ids=tuple(range(1000, 1000 + ids)),
            rollout_logprobs=tuple(-0.001 * j for j in range(ids)),
            versions=(VersionSpan(3, 0, ids),),
            state=f"turn {k}: your move",
            began=1e9,
            seconds=0.5,
        )

    episodes = tuple(
        Episode(
            f"{name}/{k}",
            "chatter",
            Task(seed=1),
            k,
            tuple(turn(j) for j in range(turns)),
            {"agent": {"turns": float(k)}},
            {"agent": float(k)},
        )
        for k in range(size)
    )
    return Group(name, Task(seed=1), episodes)


def fitted(rows: Sequence[tuple[Sequence[float], float]], names: Sequence[str]) -> dict[str, Any]:
    """Fit costs by what they scale with.

    Minimizes the squared *relative* error over all rows but the last, with costs of at least 0.

    Returns:
        Cost by name, and the relative error of the last row as "held-out error".
    """
    *used, (last, measured) = rows
    x = np.array([np.array(row) / y for row, y in used])
    best, costs = np.inf, np.zeros(len(names))
    for kept in itertools.product((False, True), repeat=len(names)):  # costs are not negative
        some = np.zeros(len(names))
        some[list(kept)] = np.linalg.lstsq(x[:, list(kept)], np.ones(len(used)), rcond=None)[0]
        off = float(np.sum((x @ some - 1) ** 2))
        if (some >= 0).all() and off < best:
            best, costs = off, some
    found = {name: float(f"{cost:.3g}") for name, cost in zip(names, costs, strict=True)}
    return found | {"held-out error": round(float(np.dot(costs, last) / measured - 1), 3)}


def driver_work(folder: Path, size: int = 8) -> dict[str, Any]:
    """Fit the driver's costs per episode, turn and sampled id."""
    log = GroupLog(folder / "groups")
    log.begin(0, ())
    algo = AlgoConfig()
    batch, files = [], []
    for turns, ids in ((1, 16), (8, 16), (8, 256), (32, 64), (4, 128)):
        group = make_group("0-0", size, turns, ids)
        sent = pickle.dumps(group)

        def work(sent: bytes = sent) -> None:
            got = pickle.loads(sent)
            log.add(Played(0, got))
            rows = make_batch([got], advantages([got], algo))
            pickle.dumps(rows)

        def write(group: Group = group) -> None:
            for episode in group.episodes:
                json.dumps(episode_to_json(episode), ensure_ascii=False)

        scale = (1.0, turns, turns * ids)
        batch.append((scale, cpu_of(work) / size))
        files.append((scale, cpu_of(write) / size))
        log.begin(0, ())
    log.close()
    names = ("episode", "turn", "id")
    return {"batch": fitted(batch, names), "files": fitted(files, names)}


def recorder_work() -> dict[str, float]:
    """Measure the recorder's cost of a turn that arrives as bytes."""
    blob = turn_to_bytes(make_group("0-0", 1, 1, 64).episodes[0].turns[0])

    def work() -> None:
        log = TurnLog()
        for k in range(1000):
            log.add(f"{k // 64}/{k % 8}", 0, blob)
        for k in range(16):
            log.remove(str(k))

    return {"turn": cpu_of(work) / 1000}


async def play(env: Any, chat: Chat, task: Callable[[int], Task], episodes: int) -> float:
    """Measure CPU seconds per turn in this process."""
    player = PolicyPlayer(chat, FakeEngine(chat.reply(REPLY)), Sampling())
    plans = [GroupPlan(str(k), task(k), 1, k) for k in range(episodes)]
    turns, began = 0, time.process_time()
    playing = play_groups(env, plans, {"agent": player}, concurrency=256)
    async with aclosing(playing) as groups:
        async for group in groups:
            turns += sum(len(episode.turns) for episode in group.episodes)
    return (time.process_time() - began) / turns


def worker_work(chat: Chat, episodes: int) -> dict[str, float]:
    """Measure the cost of a turn of rollouts alone."""
    found = {}
    tictactoe = rayrl.load_env("tictactoe")
    tasks = tictactoe.tasks(1, 64)
    for name, env, task in (
        ("chatter", chatter, lambda k: Task(seed=k)),
        ("tictactoe", tictactoe, lambda k: tasks[k % 64]),
    ):
        runs = [asyncio.run(play(env, chat, task, episodes)) for _ in range(3)]
        found[name] = min(runs)
    return found


def weights_work() -> dict[str, float]:
    """Measure checksum and copy into allocated memory per MB (10^6 bytes)."""
    flat = np.arange(16_000_000, dtype=np.uint8)
    target = np.zeros_like(flat)
    return {
        "checksum per MB": cpu_of(lambda: checksum(flat)) / 16,
        "copy per MB": cpu_of(lambda: np.copyto(target, flat)) / 16,
    }


def wire_work() -> dict[str, Any]:
    """Fit the cost of a request by ids of its context: building and pickling."""

    def work(ids: int) -> float:
        before, new = tuple(range(1000, 1000 + ids)), (1, 2, 3)

        def one() -> None:
            pickle.dumps(Request("0/0", (*before, *new), Sampling()))

        return cpu_of(one)

    return fitted([((1.0, n), work(n)) for n in (100, 20_000, 3_000)], ("request", "id"))


# ---- on Ray


def hop_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Fit the costs of env worker and replica per request, message and second."""
    return {
        f"hop {role}": fitted(
            [((1.0, row["calls"], 1 / row["turns/s"]), row["turn"][role]) for row in rows],
            ("request", "message", "second"),
        )
        for role in ("env worker", "replica")
    }


def to_one(rows: Sequence[dict[str, Any]], idle: float, unpickling: float) -> tuple[float, float]:
    """Return CPU seconds of a message to the driver and of a recorder call, means over the rows.

    Env workers wait `PAUSE_S` before they send to a process, so a row's numbers of messages and
    calls follow from its groups and turns.
    """
    message, call = [], []
    for row in rows:
        groups = row["turns/s"] / TURNS / SIZE
        spent = (row["driver_episode"] - unpickling) * SIZE - idle / groups
        message.append(spent * (1 + PAUSE_S * groups))
        call.append(row["turn"]["recorder"] * (1 + PAUSE_S * row["turns/s"]))
    return float(np.mean(message)), float(np.mean(call))


class Cluster:
    """Env workers and replicas with a fake engine."""

    def __init__(self, session: Any, chat: Chat, latency: float) -> None:
        self.session, self.chat, self.latency = session, chat, latency
        self.app = f"{session.name}-fake"

    async def deploy(self, replicas: int) -> Any:
        """Deploy the replicas and return their handle."""
        from rayrl.cluster.serving.replica import deploy

        make = partial(FakeEngine, self.chat.reply(REPLY), self.latency)

        def engine() -> Engine:
            return make()  # type: ignore[return-value]  # has all that rollouts use

        self.config = from_dict({"cluster": {"replicas": replicas}})
        return await deploy(self.session, self.config, engine, app=self.app, store=False)

    async def workers(self, workers: int, live: int) -> Any:
        """Start env workers and return their rollouts."""
        from rayrl.cluster.rollouts import Rollouts
        from rayrl.cluster.workers.env_worker import PlayedEnv, WorkerJob

        where = f"{HERE}:chatter"
        config = from_dict(
            {"env": {"name": where}, "cluster": {"concurrency": live, "env_workers": workers}}
        )
        models, apps = {"policy": str(model_dir("embedded"))}, {"policy": self.app}
        spec = rayrl.load_env(where).spec
        rollouts = Rollouts(
            WorkerJob({"": PlayedEnv(spec, {"agent": "policy"}, Sampling())}, config, models, apps)
        )
        await rollouts.ready()
        return rollouts


async def measured_play(rollouts: Any, episodes: int, size: int, tag: str) -> dict[str, Any]:
    """CPU seconds per turn by role; the driver's an episode; turns per second."""
    plans = [GroupPlan(f"{tag}-{k}", Task(seed=k), size, k) for k in range(episodes // size)]
    groups: list[Group] = []
    accounts, began = Accounts(), time.perf_counter()
    await rollouts.play(plans, 0, groups.append)
    spent, wall = accounts.spent(), time.perf_counter() - began
    turns = sum(len(episode.turns) for group in groups for episode in group.episodes)
    waits = [t.seconds for group in groups for e in group.episodes for t in e.turns]
    return {
        "turns/s": round(turns / wall, 1),
        "available cores": round(accounts.cores(), 2),
        "answer_s": round(float(np.mean(waits)), 4),
        "driver_episode": spent["driver"] / episodes,
        "turn": {who: seconds / turns for who, seconds in spent.items()},
    }


async def on_ray(args: argparse.Namespace, chat: Chat) -> dict[str, Any]:
    """Measure hops, the driver by number of env workers, stores and broadcasts."""
    import ray

    from rayrl.cluster.session import open_session
    from rayrl.cluster.weight_sync.transports import ask_all

    found: dict[str, Any] = {"driver by env workers": {}}
    with open_session(from_dict({}).cluster) as session:
        cluster = Cluster(session, chat, 0.2)
        handle = await cluster.deploy(1)
        idle = Accounts()
        began = time.perf_counter()
        await asyncio.sleep(3)
        found["idle per second"] = {
            who: s / (time.perf_counter() - began) for who, s in idle.spent().items()
        }
        rows = []
        for live in (8, 32, 128, 1024, 4096, 256):
            rollouts = await cluster.workers(1, live)
            try:
                await measured_play(rollouts, min(live, 64), SIZE, "warm")
                before = await counts_of(handle)
                row = await measured_play(rollouts, min(max(4 * live, 128), 8192), SIZE, "hop")
                answers, calls = np.subtract(await counts_of(handle), before)
                row["calls"] = float(calls / answers)
            finally:
                rollouts.close()
            rows.append(row | {"live": live})
        found["hop runs"] = rows
        found |= hop_of(rows)
        for workers in args.workers:
            rollouts = await cluster.workers(workers, 512)
            try:
                await measured_play(rollouts, 64 * workers, 16, "warm")
                parts = [
                    await measured_play(rollouts, 1024 * workers, 16, f"h{k}") for k in range(2)
                ]
                found["driver by env workers"][workers] = {
                    "ms per episode": round(1000 * min(p["driver_episode"] for p in parts), 4),
                    "recorder ms per turn": round(
                        1000 * min(p["turn"]["recorder"] for p in parts), 5
                    ),
                }
            finally:
                rollouts.close()
        found["driver message"], found["recorder call"] = to_one(
            rows, found["idle per second"]["driver"], _unpickling(TURNS, 8)
        )
        began_cpu = time.process_time()
        for _ in range(50):
            await ask_all(handle, "check_health")
        found["ask per replica"] = (time.process_time() - began_cpu) / 50
        found["put per MB"] = fitted(
            [((1.0, mb), _put(ray, mb)) for mb in (1, 64, 16)], ("call", "MB")
        )
    return found


def _unpickling(turns: int, ids: int, size: int = 16) -> float:
    """Measure the CPU seconds of unpickling per episode."""
    sent = pickle.dumps(make_group("0-0", size, turns, ids))
    return cpu_of(lambda: pickle.loads(sent)) / size


def _put(ray: Any, mb: int) -> float:
    flat = np.zeros(mb * 1_000_000, np.uint8)
    return cpu_of(lambda: ray.get(ray.put(flat)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE.parent / "costs.json")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2, 4])
    args = parser.parse_args()
    chat = Chat.load(str(model_dir("embedded")))
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = {
            "driver": driver_work(Path(folder)),
            "recorder": recorder_work(),
            "env worker": worker_work(chat, 500),
            "wire": wire_work(),
            "push": weights_work(),
        }
    print(json.dumps(found, indent=1), flush=True)
    found |= asyncio.run(on_ray(args, chat))
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(dict(itertools.islice(found.items(), 5, None)), indent=1))


if __name__ == "__main__":
    main()
