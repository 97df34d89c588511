"""Generate the choices of a request with an engine, whole or streamed."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from secrets import randbits

from rayrl.chat.renderer import Chat
from rayrl.chat.requests import ApiError
from rayrl.engine.protocol import Engine
from rayrl.errors import InfraError
from rayrl.server.choice import Choice, ChoiceDelta
from rayrl.server.fields import MAX_CHOICES, Body, stop_strings
from rayrl.server.messages import Prompt
from rayrl.types import Delta, Request, Sampling, derive_seed

__all__ = ["Job", "Usage", "generate", "plan", "stream"]


@dataclass(slots=True)
class Usage:
    """Numbers of prompt and completion ids; `cached` prompt ids were not recomputed."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0


@dataclass(frozen=True)
class Job:
    """The generations of a request.

    Attributes:
        requests: one per choice, in the order of the choices.
        choice: creates the `Choice` that processes a completion.
        copies: number of choices per prompt.
        prompt_tokens: ids of all prompts, each prompt counted once.
        must_call: whether an answer without a call is an error.
        single_call: whether the first call ends an answer; only its `Choice` knows where that is.
    """

    requests: tuple[Request, ...]
    choice: Callable[[], Choice]
    copies: int
    prompt_tokens: int
    must_call: bool = False
    single_call: bool = False

    def usage(self, choices: Sequence[Choice]) -> Usage:
        """Return the usage; a prompt's cached ids are those of its first choice."""
        cached = sum(choice.cached for choice in choices[:: self.copies])
        return Usage(self.prompt_tokens, sum(choice.ids for choice in choices), cached)


def plan(
    chat: Chat,
    engine: Engine,
    body: Body,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int | None,
    top_logprobs: int | None,
    param: str,
) -> Job:
    """Plan the engine's requests.

    Args:
        prompts: prompts; each gets `body.n` choices.
        max_tokens: maximum ids per choice; None: as many as fit.
        top_logprobs: alternatives per position; None: no logprobs.
        param: the field that contains the prompts.

    Raises:
        ApiError: 400, a prompt is too long, or there are too many choices.
    """
    stops = stop_strings(body.stop)
    seed = randbits(63) if body.seed is None else body.seed
    copies, name = body.n or 1, uuid.uuid4().hex
    if len(prompts) * copies > MAX_CHOICES:
        what = f"{len(prompts)} prompts with {copies} choices each: at most {MAX_CHOICES} in all."
        raise ApiError(400, what, param=param)
    requests: list[Request] = []
    for number, prompt in enumerate(prompts):
        sampling = Sampling(
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=body.top_k or 0,
            max_tokens=_completion_limit(len(prompt.ids), max_tokens, engine.max_len, param),
            stop=stops,
        )
        for copy in range(copies):
            requests.append(
                Request(
                    f"{name}/{len(requests)}",
                    prompt.ids,
                    sampling,
                    chat.stop_ids,
                    derive_seed(seed, number, copy),
                    top_logprobs=top_logprobs or 0,
                )
            )
    first = prompts[0]

    def choice() -> Choice:
        return Choice(
            chat,
            stops,
            calls=first.calls,
            prefix=first.prefix,
            single_call=first.single_call,
            logprobs=top_logprobs is not None,
        )

    prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
    must_call = bool(first.prefix)
    return Job(tuple(requests), choice, copies, prompt_tokens, must_call, first.single_call)


def _completion_limit(prompt: int, max_tokens: int | None, max_len: int, param: str) -> int:
    needed = prompt + (max_tokens or 1)
    if needed > max_len:
        answer = f" and {max_tokens} for the answer" if max_tokens else ""
        raise ApiError(
            400,
            f"This model's maximum context length is {max_len} tokens, and this request needs "
            f"{needed} ({prompt} in the prompt{answer}). Shorten the messages or ask for fewer "
            "tokens.",
            param=param if prompt >= max_len else "max_tokens",
            code="context_length_exceeded",
        )
    return max_tokens or max_len - prompt


async def generate(engine: Engine, job: Job) -> list[tuple[Choice, ChoiceDelta]]:
    """Generate every choice with its whole content."""
    try:
        async with asyncio.TaskGroup() as group:  # a failure or cancellation cancels all
            tasks = [group.create_task(_generate(engine, job, r)) for r in job.requests]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]


async def _generate(engine: Engine, job: Job, request: Request) -> tuple[Choice, ChoiceDelta]:
    choice, content = job.choice(), ChoiceDelta()
    if job.single_call:
        async with aclosing(engine.stream(request)) as parts:
            async for part in parts:
                content += choice.read(part)
                if choice.finish is not None:
                    break
    else:
        done = await engine.generate(request)
        whole = Delta(done.ids, done.rollout_logprobs, done.finish, done.cached, done.alternatives)
        content = choice.read(whole)
    _check(choice, job)
    return choice, content


async def stream(
    engine: Engine, job: Job, choices: Sequence[Choice]
) -> AsyncGenerator[tuple[int, ChoiceDelta], None]:
    """Yield index and new content of the choices as generated; closing it cancels all of them."""
    ready: asyncio.Queue[tuple[int, ChoiceDelta] | Exception | None] = asyncio.Queue()

    async def read(index: int) -> None:
        try:
            async with aclosing(engine.stream(job.requests[index])) as parts:
                async for part in parts:
                    delta = choices[index].read(part)
                    _check(choices[index], job)
                    ready.put_nowait((index, delta))
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
            "The model was forced to begin a tool call and did not complete a valid one. "
            "Try again, or use tool_choice=auto.",
            code="tool_call_invalid",
        )
