"""What a sandbox costs beside a bare child process.

    python benchmarks/sandbox.py

Milliseconds of processor time (of this process and of all that it waited for) and of wall time for
one program, one after the other and `--live` at once: `true` and `python -c pass`, as a bare child
of asyncio, in a sandbox of its own, and in one sandbox that is kept. Each is done `--times` times
in each of `--rounds` rounds, which take turns; the median of the rounds is printed.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import shutil
import statistics
import time
from collections.abc import Awaitable, Callable

import rayrl
from rayrl.rollout.sandbox.protection import Isolation

PROGRAMS = {"true": ["true"], "python": ["python3", "-c", "pass"]}
Run = Callable[[list[str]], Awaitable[object]]


def processor_s() -> float:
    """Of this process and of its children's ends so far; a supervisor's children are in its own."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


async def bare(command: list[str]) -> None:
    program = shutil.which(command[0]) or command[0]
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(
        program, *command[1:], stdin=pipe, stdout=pipe, stderr=pipe
    )
    await child.communicate(b"")


def sandboxed(isolation: Isolation) -> Run:
    async def run(command: list[str]) -> None:
        assert (await rayrl.sandbox(command, timeout_s=60, isolation=isolation)).ok

    return run


async def measured(run: Run, command: list[str], times: int, live: int) -> tuple[float, float]:
    """Milliseconds of processor and wall time for one."""
    gate = asyncio.Semaphore(live)

    async def one() -> None:
        async with gate:
            await run(command)

    processor, wall = processor_s(), time.perf_counter()
    await asyncio.gather(*[one() for _ in range(times)])
    taken = processor_s() - processor, time.perf_counter() - wall
    return 1000 * taken[0] / times, 1000 * taken[1] / times


async def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--live", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    ways: dict[str, Run] = {"bare": bare, "sandbox": sandboxed("full")}
    try:
        rayrl.sandbox_protection("limits")
        ways["limits alone"] = sandboxed("limits")
    except rayrl.EnvError as error:
        print(f"limits alone: {error}")
    print(f"sandbox: {rayrl.sandbox_protection().kind}")
    figures: dict[tuple[str, str, int], list[tuple[float, float]]] = {}
    for _ in range(args.rounds):
        for program, command in PROGRAMS.items():
            for way, run in ways.items():
                for live in (1, args.live):
                    taken = await measured(run, command, args.times, live)
                    figures.setdefault((program, way, live), []).append(taken)
            before = processor_s()
            async with rayrl.Sandbox() as box:

                async def kept(command: list[str], box: rayrl.Sandbox = box) -> None:
                    assert (await box.run(command, timeout_s=60)).ok

                _, wall = await measured(kept, command, args.times, 1)
            # with its start and end, as the kernel tells a child's time at its end
            both = 1000 * (processor_s() - before) / args.times
            figures.setdefault((program, f"kept for {args.times} runs", 1), []).append((both, wall))
    print(f"{'program':8} {'way':20} {'live':>4} {'processor ms':>13} {'wall ms':>9}")
    for (program, way, live), rounds in figures.items():
        processor, wall = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(f"{program:8} {way:20} {live:4} {processor:13.1f} {wall:9.1f}")


if __name__ == "__main__":
    asyncio.run(main())
