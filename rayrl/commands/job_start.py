"""What a submitted job runs: `python start.py VERB key=value ...`, from a copy of a bundle.

Only the standard library is imported before it is known that this Python can run the rest.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).resolve().parent
FOLDER = "RAYRL_WORKDIR"


def wrong_here() -> list[str]:
    """Why the code that was sent cannot run on this Python, a sentence each."""
    sent = json.loads((HERE / "rayrl-code.json").read_text("utf-8"))
    python = ".".join(platform.python_version_tuple()[:2])
    found = []
    if python != sent["python"]:
        found.append(
            f"the cluster's `python` ({sys.executable}) is {python}, and the job was submitted "
            f"with {sent['python']}: use the same for both."
        )
    try:
        if version("ray") != sent["ray"]:
            found.append(
                f"the cluster has ray {version('ray')}, and the job was submitted with ray "
                f"{sent['ray']}: install the same version for both."
            )
        found += missing()
    except PackageNotFoundError:
        found.append(
            f"the cluster's `python` ({sys.executable}) has no ray: start the head with the "
            "environment's bin folder first on the PATH, as with `source .venv/bin/activate`."
        )
    return found


def missing() -> list[str]:
    """What rayrl needs that is not there, or only in a version it cannot use."""
    from packaging.requirements import Requirement

    found = []
    for file in HERE.glob("rayrl-*.dist-info/METADATA"):
        for line in re.findall(r"^Requires-Dist: (.*)", file.read_text("utf-8"), re.MULTILINE):
            needed = Requirement(line)
            if needed.marker and not needed.marker.evaluate({"extra": ""}):
                continue
            try:
                have = version(needed.name)
            except PackageNotFoundError:
                have = ""
            if not have or not needed.specifier.contains(have, prereleases=True):
                what = f"has {needed.name} {have}" if have else f"has no {needed.name}"
                found.append(f"the cluster {what}, and rayrl needs {needed}.")
    return found


def main() -> int:
    """Check, go to the job's folder, run the verb; its exit status."""
    wrong = wrong_here()
    folder = os.environ.get(FOLDER)
    if folder and not Path(folder).is_dir():
        wrong.append(
            f"{FOLDER}={folder}: the cluster's head has no such folder. Make it, on storage that "
            "all nodes share, or name another."
        )
    if wrong:
        print("\n".join(f"rayrl: {one}" for one in wrong), file=sys.stderr)
        return 2
    sys.path.insert(0, str(HERE))
    words = sys.argv[1:]
    if (HERE / "config-dir").is_dir():
        words += ["--config-dir", str(HERE / "config-dir")]
    if folder:
        os.chdir(folder)
    from rayrl.cli import main as run

    return run(words)


if __name__ == "__main__":
    sys.exit(main())
