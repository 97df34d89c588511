"""`rayrl report RUN`: write RUN/report.html from the files of a run, finished or not.

RUN is the folder of a recipe or of one of its stages.
"""

from __future__ import annotations

from rayrl.config import Config
from rayrl.report.collect import write_report

__all__ = ["run"]


def run(config: Config) -> None:
    """Write the report of the run in `config.run.dir` and print its path."""
    print(f"Report in {write_report(config.run.dir)}")
