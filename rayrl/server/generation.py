"""Choices from an engine: all at once, or in parts as they are made."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from secrets import randbits

from rayrl.chat.renderer import Chat
from rayrl.engine.protocol import Engine
from rayrl.errors import InfraError
from rayrl.server.choice import Choice, News
from rayrl.server.errors import ApiError
from rayrl.server.fields import MAX_CHOICES, Body, stop_strings
from rayrl.server.messages import Asked
from rayrl.types import Delta, Request, Sampling, derive_seed

__all__ = ["Job", "Usage", "generate", "plan", "stream"]


@dataclass(slots=True)
class Usage:
    """Ids read and written; `cached` of those read were not computed again."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0


@dataclass(frozen=True)
class Job:
    """A request's generations.

    Attributes:
        requests: one per choice, in the order of the choices.
        choice: makes the reader of one.
        copies: choices of each prompt.
        prompt_tokens: of all prompts, each counted once.
        must_call: whether an answer without a call is an error.
        once: whether the first call ends an answer. Only its reader knows where that is.
    """

    requests: tuple[Request, ...]
    choice: Callable[[], Choice]
    copies: int
    prompt_tokens: int
    must_call: bool = False
    once: bool = False

    def usage(self, choices: Sequence[Choice]) -> Usage:
        """What it took. A prompt counts as cached as far as its first choice found it so."""
        cached = sum(choice.cached for choice in choices[:: self.copies])
        return Usage(self.prompt_tokens, sum(choice.ids for choice in choices), cached)


def plan(
    chat: Chat,
    engine: Engine,
    body: Body,
    asked: Sequence[Asked],
    *,
    most: int | None,
    top: int | None,
    param: str,
) -> Job:
    """What the engine is to do.

    Args:
        asked: prompts; each has `body.n` choices.
        most: ids of a choice at most; None: as many as fit.
        top: alternatives told with each logprob; None: no logprobs.
        param: the field that the prompts come from.

    Raises:
        ApiError: 400, a prompt is too long, or they want too many choices.
    """
    stops = stop_strings(body.stop)
    seed = randbits(63) if body.seed is None else body.seed
    copies, name = body.n or 1, uuid.uuid4().hex
    if len(asked) * copies > MAX_CHOICES:
        what = f"{len(asked)} prompts with {copies} choices each: at most {MAX_CHOICES} in all."
        raise ApiError(400, what, param=param)
    requests: list[Request] = []
    for number, one in enumerate(asked):
        sampling = Sampling(
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=body.top_k or 0,
            max_tokens=_room(len(one.ids), most, engine.max_len, param),
            stop=stops,
        )
        for copy in range(copies):
            requests.append(
                Request(
                    f"{name}/{len(requests)}",
                    one.ids,
                    sampling,
                    chat.stop_ids,
                    derive_seed(seed, number, copy),
                    top_logprobs=top or 0,
                )
            )
    first = asked[0]

    def choice() -> Choice:
        return Choice(
            chat,
            stops,
            calls=first.calls,
            begun=first.begun,
            once=first.once,
            logprobs=top is not None,
        )

    prompt_tokens = sum(len(one.ids) for one in asked)
    must_call = bool(first.begun)
    return Job(tuple(requests), choice, copies, prompt_tokens, must_call, first.once)


def _room(prompt: int, most: int | None, max_len: int, param: str) -> int:
    wanted = most or 1
    if prompt + wanted > max_len:
        what = f"{prompt} in the prompt" + (f" and {most} for the answer" if most else "")
        raise ApiError(
            400,
            f"This model's maximum context length is {max_len} tokens, and this request needs "
            f"{prompt + wanted} ({what}). Shorten the messages or ask for fewer tokens.",
            param=param if prompt >= max_len else "max_tokens",
            code="context_length_exceeded",
        )
    return most or max_len - prompt


async def generate(engine: Engine, job: Job) -> list[tuple[Choice, News]]:
    """Every choice with all that is told about it."""
    try:
        async with asyncio.TaskGroup() as group:  # one that fails, or we, cancelled: all are
            tasks = [group.create_task(_whole(engine, job, request)) for request in job.requests]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]


async def _whole(engine: Engine, job: Job, request: Request) -> tuple[Choice, News]:
    choice, news = job.choice(), News()
    if job.once:
        async with aclosing(engine.stream(request)) as parts:
            async for part in parts:
                news += choice.read(part)
                if choice.finish is not None:
                    break
    else:
        done = await engine.generate(request)
        whole = Delta(done.ids, done.rollout_logprobs, done.finish, done.cached, done.alternatives)
        news = choice.read(whole)
    _check(choice, job)
    return choice, news


async def stream(
    engine: Engine, job: Job, choices: Sequence[Choice]
) -> AsyncGenerator[tuple[int, News], None]:
    """News of the choices as they come, each with the choice's index. Closing it ends them all."""
    ready: asyncio.Queue[tuple[int, News] | Exception | None] = asyncio.Queue()

    async def read(index: int) -> None:
        try:
            async with aclosing(engine.stream(job.requests[index])) as parts:
                async for part in parts:
                    news = choices[index].read(part)
                    _check(choices[index], job)
                    ready.put_nowait((index, news))
                    if choices[index].finish is not None:
                        break
            ready.put_nowait(None)
        except Exception as error:
            ready.put_nowait(error)

    tasks = [asyncio.create_task(read(index)) for index in range(len(job.requests))]
    left = len(tasks)
    try:
        while left:
            item = await ready.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _check(choice: Choice, job: Job) -> None:
    if choice.finish == "abort":
        raise InfraError("the engine stopped this generation")
    if job.must_call and choice.finish == "stop":
        raise ApiError(
            500,
            "The model was made to begin a tool call and did not finish one that can be read. "
            "Ask again, or with tool_choice=auto.",
            code="tool_call_invalid",
        )
