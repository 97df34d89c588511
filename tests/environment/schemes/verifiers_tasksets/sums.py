"""Sums, each in one turn; and tasks in which something fails."""

import random
import threading
from collections.abc import Iterator

import verifiers.v1 as vf
from talk import Talk
from verifiers.v1.errors import SandboxError


class SumData(vf.TaskData):
    answer: int
    fault: str = ""


class Sum(vf.Task[SumData, vf.State, vf.TaskConfig]):
    async def setup(self, trace: vf.Trace, runtime: vf.Runtime) -> None:
        if self.data.fault == "sandbox":
            raise SandboxError("no machine is left")
        if self.data.fault == "block":
            threading.Event().wait()

    @vf.reward(weight=2.0)
    async def right(self, trace: vf.Trace) -> float:
        if self.data.fault == "reward":
            raise ZeroDivisionError("of nothing")
        return float(trace.last_reply == str(self.data.answer))

    @vf.reward(weight=0.5)
    async def short(self, trace: vf.Trace) -> float:
        return float(len(trace.last_reply) < 3)

    @vf.metric
    async def luck(self, trace: vf.Trace) -> float:
        return random.random()


class SumsConfig(vf.TasksetConfig):
    most: int = 20
    fault: str = ""


class Sums(vf.Taskset[Sum, SumsConfig]):
    def load(self) -> Iterator[Sum]:
        for k in range(self.config.most):
            a = random.randrange(50)
            prompt = f"{k} + {a} = ?"
            data = SumData(idx=k, prompt=prompt, answer=k + a, fault=self.config.fault)
            yield Sum(data, self.config.task)


class Careful(Talk):
    """What its agent runs unless somebody says otherwise."""


__all__ = ["Careful", "Sums"]
