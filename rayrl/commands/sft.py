"""`rayrl sft`: fine-tuning on episodes or chats, with the learner that reinforcement uses.

A conversation gets exactly the ids that playing it would give (`Chat.render`), and the loss is
taken on the model's replies, their end of turn included. Batch s of a run is a function of the seed
and s, so a resumed run sees the same batches.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from rayrl.chat.renderer import Chat
from rayrl.chat.tools import format_call
from rayrl.cluster.learner_group import LearnerGroup
from rayrl.cluster.open import make_environment, open_cluster, open_learners
from rayrl.cluster.weight_sync.push import WeightSync
from rayrl.config import Config, validate
from rayrl.config.mix import components, named_keys
from rayrl.conversations import transcripts
from rayrl.environment.chat_data import chat_messages
from rayrl.environment.data_files import DataRow, read_data
from rayrl.environment.environment import Environment
from rayrl.environment.rows import missing_column
from rayrl.errors import ConfigError, DataError, did_you_mean
from rayrl.learner.batch import Trajectory, batch_of, supervised_row
from rayrl.rollout.episode_io import read_episodes
from rayrl.run.evaluation.evaluator import Evaluator, check_metrics
from rayrl.run.folder import RunDir
from rayrl.run.loggers import LogFunction, Logger
from rayrl.run.progress_bar import ProgressBar
from rayrl.run.stage import (
    MODEL,
    POLICY,
    already_finished,
    check_trained,
    log_template_notes,
    positions,
    seats_of,
)
from rayrl.run.start_check import check_start
from rayrl.run.training import Recovery
from rayrl.types import Episode, Message, Turn, derive_seed
from rayrl.weights.model_dir import model_dir

__all__ = [
    "batch_indices",
    "chat_turns",
    "has_chats",
    "load_rows",
    "rows_of",
    "run",
    "sft",
]


def run(config: Config) -> None:
    """Fine-tune `config.model` on `config.sft.data`; resumes if the run folder has a checkpoint."""
    asyncio.run(sft(config))
    print(f"Model in {Path(config.run.dir) / MODEL}")


async def sft(config: Config, *, loggers: Sequence[str | Logger | LogFunction] = ()) -> None:
    """Fine-tune, unless the run is finished.

    Args:
        loggers: besides those of `run.loggers`.

    Raises:
        ConfigError: a setting cannot work.
        DataError: the data cannot be read, or nothing in it can be trained on.
    """
    validate(config, "sft")
    check_start(config, "sft")
    with RunDir(config.run.dir, config, begin=False, loggers=loggers, verb="sft") as folder:
        if folder.finished is None:
            await _fine_tune(config, folder)
        else:
            print(already_finished(folder.path))


async def _fine_tune(config: Config, folder: RunDir) -> None:
    """The loop: pick rows, update, evaluate and save where due."""
    cfg = config.sft
    model = model_dir(config.model.path)
    rows = load_rows(config, Chat.load(str(model)), config.engine.max_len or positions(model))
    done, stopped = 0, False
    bar = ProgressBar(config.run.name, cfg.steps)
    async with _opened(config, folder, bar) as (learner, evaluations):
        folder.begin()
        with bar:
            recovery = Recovery(learner, folder, bar, config.learner.restarts)
            async for attempt in recovery.attempts():
                with attempt:
                    done = attempt.start
                    stopped = await evaluations.begin(done)
                    while done < cfg.steps and not stopped:
                        chosen = batch_indices(len(rows), cfg.batch_size, done, config.run.seed)
                        picked = [rows[index] for index in chosen]
                        figures = await _step(config, learner, picked, done, len(rows))
                        done += 1
                        figures |= await evaluations.after(done)
                        stopped = evaluations.is_over(done)
                        _log(folder, bar, done - 1, figures)
                        last = stopped or done == cfg.steps
                        if done % config.run.checkpoint_every == 0 or last:
                            with folder.checkpoint(done) as path:
                                await learner.save(path)
                            recovery.checkpointed()
                    with folder.whole(MODEL) as path:
                        await learner.export(path)
    result = {"steps": done, "rows": len(rows), "stopped": stopped}
    folder.finish(result | evaluations.result(done))


@asynccontextmanager
async def _opened(
    config: Config, folder: RunDir, bar: ProgressBar
) -> AsyncIterator[tuple[LearnerGroup, SftEvaluations]]:
    """The learner; with `eval.every` also replicas and env workers."""
    if not config.eval.every:
        log_template_notes(config)
        async with open_learners(config, config.sft.steps) as learner:
            yield learner, SftEvaluations()
        return
    environments: dict[str, Environment] = {}
    seats = [POLICY]
    for name, own in components(config).items():
        environments[name] = make_environment(own, name)
        with named_keys(name):
            check_trained(environments[name], own)
            seats += seats_of(environments[name], own, "model").values()
    check_metrics(config, environments, "sft")
    log_template_notes(config, seats)
    async with open_cluster(config, config.sft.steps) as (rollouts, learner, weights):
        evaluator = Evaluator(config, folder, rollouts, learner, "sft", bar.note)
        yield learner, SftEvaluations(evaluator, weights)


class SftEvaluations:
    """SftEvaluations between updates: replicas get the weights for them alone.

    Without an evaluator there are none.
    """

    def __init__(
        self, evaluator: Evaluator | None = None, weights: WeightSync | None = None
    ) -> None:
        self._evaluator, self._weights = evaluator, weights
        self._pushed = -1

    async def begin(self, start: int) -> bool:
        """Evaluate before the first step; returns whether a run that goes on at `start` is over.

        Called again after the learner was lost.
        """
        if self._evaluator is None or self._weights is None:
            return False
        self._weights.reset()
        if start == 0:
            await self.after(0)
        await self._weights.sleep_replicas()
        return self.is_over(start)

    async def after(self, step: int) -> dict[str, float]:
        """Evaluate the weights of so many steps, if it is due; metrics for their line."""
        found = self._evaluator
        if found is None or self._weights is None:
            return {}
        metrics = found.start_metrics() if step == 1 else {}
        if found.is_due(step):
            began = time.perf_counter()
            if step not in found and step >= self._pushed:
                await self._weights.push(step)
                self._pushed = step
            metrics |= await found.evaluate(step, self._pushed)
            await self._weights.sleep_replicas()
            metrics["time/evaluate"] = time.perf_counter() - began
        return metrics

    def is_over(self, step: int) -> bool:
        """Whether `sft.stop_when` ends the run after so many steps."""
        return self._evaluator is not None and step > 0 and self._evaluator.is_over(step)

    def result(self, step: int) -> dict[str, Any]:
        """See `Evaluator.result`."""
        return {} if self._evaluator is None else self._evaluator.result(step)


async def _step(
    config: Config, learner: LearnerGroup, picked: Sequence[Trajectory], step: int, rows: int
) -> dict[str, float]:
    """One update; returns its figures."""
    began = time.perf_counter()
    batch = batch_of(picked)
    ready = time.perf_counter()
    learned = await learner.sft_step(batch)
    done = time.perf_counter()
    return {
        "loss": learned["loss"],
        "entropy": learned["entropy"],
        "grad_norm": learned["grad_norm"],
        "lr": learned["lr"],
        "skipped": learned["skipped"],
        "tokens": batch.totals.tokens,
        "episodes": float(len(picked)),
        "epoch": (step + 1) * config.sft.batch_size / rows,
        "time/batch": ready - began,
        "time/update": done - ready,
        "time/total": done - began,
    }


def _log(folder: RunDir, bar: ProgressBar, step: int, figures: Mapping[str, float]) -> None:
    folder.log(step, figures)
    bar.update(step + 1, {"loss": figures["loss"], "grad": figures["grad_norm"]})
    if figures["skipped"]:
        bar.note(f"step {step}: skipped, its loss or gradient was not finite")


def batch_indices(n: int, size: int, step: int, seed: int) -> list[int]:
    """Which of `n` rows batch `step` has: `size` in a row from one shuffle after another."""
    chosen: list[int] = []
    at = step * size
    while len(chosen) < size:
        epoch, within = divmod(at, n)
        order = list(range(n))
        random.Random(derive_seed(seed, "sft", epoch)).shuffle(order)
        part = order[within : within + size - len(chosen)]
        chosen += part
        at += len(part)
    return chosen


def load_rows(config: Config, chat: Chat, longest: int = 0) -> list[Trajectory]:
    """Training rows of the data file.

    Args:
        config: `sft.data`, `sft.loss_on`, and `env.seats` for whose replies to learn.
        chat: of the model that is trained.
        longest: most ids of a conversation; 0 is no limit.

    Raises:
        DataError: no usable episode or chat, or one too long for the model; names file and line.
    """
    data = config.sft.data
    if not data:
        raise ConfigError(
            "sft.data is empty: name the JSONL that `rayrl synth` wrote, as "
            "sft.data=runs/x/episodes.jsonl, or data with a column of messages, as "
            "sft.data=chats.jsonl."
        )
    on_all = config.sft.loss_on == "all"
    rows: list[Trajectory] = []
    for row in _chat_rows(data, chat, on_all) if has_chats(data) else _played(config, chat, on_all):
        if 0 < longest < len(row.ids):
            what = f"{config.model.path} has positions for {longest}; use another model"
            if config.engine.max_len:
                what = f"a conversation can have {longest}; raise engine.max_len"
            raise DataError(
                f"{data}: {row.id} has {len(row.ids)} ids, but {what}, or remove it from the data."
            )
        if row.n_loss:
            rows.append(row)
    if not rows:
        raise DataError(f"{data}: there is no reply to learn from; see what `rayrl synth` kept.")
    return rows


def _played(config: Config, chat: Chat, on_all: bool) -> Iterator[Trajectory]:
    """The rows of a file of episodes."""
    data = config.sft.data
    for episode in read_episodes(data):
        if episode.failure is None:
            seats = _learned_seats(config, episode, data)
            yield from rows_of(episode, seats, chat, loss_on_all=on_all)


def has_chats(data: str) -> bool:
    """Whether data is chats rather than episodes, which are JSONL of another form.

    Raises:
        DataError: the first row cannot be read.
    """
    if not data.endswith(".jsonl"):
        return True
    try:
        first = next(read_data(data))
    except (StopIteration, DataError):  # reading it as episodes says what is wrong
        return False
    if "messages" not in first.columns and not {"id", "turns"} & first.columns.keys():
        missing = missing_column(first.place, "messages", first.columns)
        raise DataError(f"{missing} sft.data has chats in it, or episodes, as synth writes them.")
    return "messages" in first.columns


def _chat_rows(data: str, chat: Chat, on_all: bool) -> Iterator[Trajectory]:
    """The rows of data with chats in a column `messages`, and perhaps their tools in `tools`."""
    for row in read_data(data):
        if "messages" not in row.columns:
            missing = missing_column(row.place, "messages", row.columns)
            raise DataError(f"{missing} Learning from chats needs it.")
        ids, is_reply = chat.render(chat_turns(row))
        yield supervised_row(ids, (True,) * len(ids) if on_all else is_reply, row.place)


def chat_turns(row: DataRow) -> list[Turn]:
    """A chat as turns, each with what was said before a reply.

    Raises:
        DataError: it is no chat, or does not end with a reply; names file and line.
    """
    where = f"{row.place}: column 'messages'"
    tools = row.columns.get("tools") or []
    if not isinstance(tools, list) or not all(_is_tool(one) for one in tools):
        raise DataError(f"{row.place}: column 'tools' must be a list of JSON schemas of functions")
    turns: list[Turn] = []
    new: list[Message] = []
    for number, message in enumerate(chat_messages(row.columns["messages"], where), 1):
        if message.role != "assistant":
            new.append(message)
        elif not new:
            raise DataError(f"{where}: message {number} is a reply to nothing")
        else:
            calls = [format_call(call.name, call.arguments) for call in message.tool_calls]
            text = "\n".join(filter(None, [message.content, *calls]))
            turns.append(Turn("agent", tuple(new), text, "stop", tools=tuple(tools)))
            new = []
    if new:
        raise DataError(f"{where} must end with a reply of the assistant, to learn from")
    return turns


def _is_tool(value: object) -> bool:
    function = value.get("function") if isinstance(value, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _learned_seats(config: Config, episode: Episode, data: str) -> list[str]:
    """Seats whose replies are learned: those `env.seats` gives to the policy, else all."""
    played = list(dict.fromkeys(turn.seat for turn in episode.turns))
    known = components(config)
    seats = known.get(episode.env, known.get("", config)).env.seats
    for seat in seats:
        if episode.scores and seat not in episode.scores:
            raise ConfigError(
                f"env.seats.{seat}: {data} has no such seat.{did_you_mean(seat, episode.scores)}"
            )
    return [seat for seat in played if seats.get(seat, POLICY) == POLICY]


def rows_of(
    episode: Episode, seats: Sequence[str], chat: Chat, *, loss_on_all: bool = False
) -> list[Trajectory]:
    """One row for each conversation of the seats; what several share is learned once.

    Args:
        loss_on_all: take the loss on what was said to the model as well.
    """
    rows = []
    for seat in seats:
        turns = episode.turns_of(seat)
        left = set(range(len(turns)))  # whose loss is in no row yet
        for number, transcript in enumerate(transcripts(turns)):
            ids, is_reply = chat.render([turns[k] for k in transcript])
            shared, _ = chat.render([turns[k] for k in transcript if k not in left])
            mask = [k >= len(shared) and (loss_on_all or one) for k, one in enumerate(is_reply)]
            rows.append(supervised_row(ids, mask, f"{episode.id}/{seat}/{number}"))
            left.difference_update(transcript)
    return rows
