"""`rayrl recipe`: every stage in one process and one Ray session, then the table and the report.

Each stage is a run of its own in RUN/<stage>. It gets from the stages before it what its own
settings leave open: the newest exported model (`model.path`) and the newest data (`sft.data`).
A finished stage is not run again, so the same command resumes a stopped recipe. Its settings cannot
be changed any more, nor its steps raised: what came after it was made from what it left.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rayrl import loop
from rayrl.cluster.code_bundle import played_code
from rayrl.cluster.open import worker_imports
from rayrl.cluster.session import open_session
from rayrl.commands import evaluate, sft, synth
from rayrl.config import Config, Stage, stage_config, validate
from rayrl.errors import RunFailed
from rayrl.report.collect import write_report
from rayrl.report.console import new_console
from rayrl.report.memory import PeakMemory
from rayrl.report.table import Result, markdown, rich_table
from rayrl.run.files import with_checksum, write_atomic
from rayrl.run.folder import RunDir, refuse_changes
from rayrl.run.stage import EPISODES, MODEL, is_finished, row_name, versions
from rayrl.run.start_check import check_start

__all__ = ["Link", "chain", "rows", "run"]

PROGRAMS: Mapping[str, Callable[[Config], None]] = {
    "synth": synth.run,
    "sft": sft.run,
    "train": loop.run,
    "eval": evaluate.run,
}
RECORD = "recipe.json"  # seconds of each stage, peak memory, versions
TABLE = "table"  # .md and .json


@dataclass(frozen=True, slots=True)
class Link:
    """One stage, ready to run.

    Attributes:
        config: its whole configuration; `run.dir` is RUN/<stage>.
        row: what the table calls whoever it evaluates; empty for a stage that evaluates nobody.
    """

    stage: Stage
    config: Config
    row: str = ""


def run(config: Config) -> None:
    """Run what is not finished yet, then print and write the table and the report.

    Raises:
        ConfigError: a finished stage would now have other settings.
        RayrlError: of the stage that cannot go on; the ones before it stay finished.
    """
    console = new_console()
    validate(config, "recipe")
    links = chain(config)
    _refuse_changes(links)
    done = [link.stage.name for link in links if is_finished(link.config.run.dir)]
    check_start(config, "recipe", done)
    with RunDir(config.run.dir, config, begin=False, verb="recipe") as folder:
        if not all(is_finished(link.config.run.dir) for link in links):
            named = played_code(config)
            imports = worker_imports(config, engine=True, learner=True)
            with (
                PeakMemory() as memory,
                open_session(config.cluster, config.run.dir, named, imports=imports),
            ):
                folder.begin()
                for number, link in enumerate(links, 1):
                    title = f"{number}/{len(links)} {link.stage.name} ({link.stage.verb})"
                    if is_finished(link.config.run.dir):
                        console.print(f"{title}: finished before", highlight=False)
                        continue
                    console.rule(title, align="left")
                    began = time.perf_counter()
                    PROGRAMS[link.stage.verb](link.config)
                    _record(folder, link.stage.name, time.perf_counter() - began, memory.peak)
                    _refuse_unfinished(link)
        folder.begin()
        found = rows(links)
        if found:
            _write_table(folder.path, found)
            console.rule(f"{config.run.name}: results", align="left")
            console.print(rich_table(found))
        page = write_report(folder.path)
        console.print(_closing(folder, page), highlight=False, markup=False)


def chain(config: Config) -> list[Link]:
    """The stages of a recipe with what each gets from the ones before it.

    A setting that a stage makes itself is left alone; so is a `model.path` or `sft.data` of the
    whole recipe as long as no earlier stage has made anything newer.
    """
    links = []
    model = data = ""
    for stage in config.recipe:
        own = replace(stage_config(config, stage), recipe=[])
        folder = Path(config.run.dir) / stage.name
        own = replace(
            own, run=replace(own.run, dir=str(folder), name=f"{config.run.name}-{stage.name}")
        )
        if model and "model.path" not in stage.set:
            own = replace(own, model=replace(own.model, path=model))
        if data and stage.verb == "sft" and "sft.data" not in stage.set:
            own = replace(own, sft=replace(own.sft, data=data))
        row = row_name(own, own.eval.player) if stage.verb == "eval" else ""
        links.append(Link(stage, own, row))
        if stage.verb in ("sft", "train"):
            model = str(folder / MODEL)
        if stage.verb == "synth":
            data = own.synth.out or str(folder / EPISODES)
    return links


def rows(links: Sequence[Link]) -> list[Result]:
    """The evaluations of a recipe that are there, in its order."""
    found = []
    for link in links:
        file = Path(link.config.run.dir) / evaluate.FILE
        if link.row and file.is_file():
            found.append(replace(Result.load(file), name=link.row))
    return found


def _refuse_changes(links: Sequence[Link]) -> None:
    for number, link in enumerate(links):
        if is_finished(link.config.run.dir):
            folders = filter(os.path.exists, [one.config.run.dir for one in links[number:]])
            remedy = (
                "Use the old ones, or give the recipe another run.name, or delete this folder and "
                f"what was made after it to make them again: {' '.join(folders)}"
            )
            refuse_changes(Path(link.config.run.dir), link.config, remedy)


def _refuse_unfinished(link: Link) -> None:
    """Stages are made from what this one leaves; nothing is made from an evaluation."""
    if link.stage.verb != "eval" and not is_finished(link.config.run.dir):
        raise RunFailed(
            f"stage {link.stage.name!r} is not finished, as it says above, and later stages need "
            "all it makes. The same command goes on with it."
        )


def _record(folder: RunDir, stage: str, seconds: float, peak_bytes: int) -> None:
    record: dict[str, Any] = folder.read_json(RECORD) or {"seconds": {}, "peak_memory": 0}
    record["seconds"][stage] = round(record["seconds"].get(stage, 0.0) + seconds, 1)
    record["peak_memory"] = max(record["peak_memory"], peak_bytes)
    record["versions"] = versions()
    folder.write_json(RECORD, record)


def _write_table(folder: Path, found: Sequence[Result]) -> None:
    rows = [with_checksum(result.to_dict()) for result in found]
    data = json.dumps(rows, indent=1, ensure_ascii=False)
    write_atomic(folder / f"{TABLE}.json", (data + "\n").encode())
    write_atomic(folder / f"{TABLE}.md", markdown(found).encode())


def _closing(folder: RunDir, page: Path) -> str:
    record = folder.read_json(RECORD) or {"seconds": {}, "peak_memory": 0}
    total = sum(record["seconds"].values())
    stages = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in record["seconds"].items())
    memory = record["peak_memory"] / 2**30
    return (
        f"{total / 60:.1f} minutes ({stages}); peak memory {memory:.1f} GiB\n"
        f"Table in {folder.path / TABLE}.md, report in {page}"
    )
