"""Checksums of what a run keeps: a damaged file is named before anything is read from it.

They show damage, not malice: whoever can change a file can change its checksum as well.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rayrl.errors import DataError
from rayrl.weights import checksum

__all__ = [
    "Sums",
    "check_weights",
    "damage",
    "opened",
    "parse",
    "read_lines",
    "seal_weights",
    "sealed",
    "sums_of",
    "text_sum",
]

Sums = dict[str, tuple[int, str]]
"""Bytes and checksum of files, by their path in a folder."""

SUMS = "checksums.json"  # in the folder of a model
_THREADS = 4
_OWN = "checksum"  # key of a record's own


def sums_of(folder: Path, pattern: str = "*") -> Sums:
    """Of all files in a folder and the folders in it."""
    files = sorted(path for path in folder.rglob(pattern) if path.is_file())
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(_sum, files)
        return {str(file.relative_to(folder)): one for file, one in zip(files, found, strict=True)}


def damage(folder: Path, sums: Mapping[str, Any]) -> str:
    """The first file that is not as it was when `sums_of` saw it, and how; empty if all are."""
    for name, (size, _) in sums.items():  # first what need not be read
        file = folder / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != size:
            return f"{file} has {file.stat().st_size:,} bytes instead of {size:,}"
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(_sum, (folder / name for name in sums))
        for (name, (_, then)), (_, now) in zip(sums.items(), found, strict=True):
            if now != then:
                return f"{folder / name} holds other bytes than were written (checksum {now})"
    return ""


def seal_weights(model: Path) -> None:
    """Leave the checksums of a model's weights beside them."""
    if sums := sums_of(model, "*.safetensors"):
        (model / SUMS).write_text(json.dumps(sealed({"files": sums}), indent=2) + "\n")


def check_weights(model: Path) -> None:
    """Compare a model's weights with the checksums beside them, if there are any.

    Raises:
        DataError: a file is damaged; names it.
    """
    file = model / SUMS
    if not file.is_file():
        return
    try:
        what = damage(model, opened(parse(file.read_bytes()))["files"])
    except (ValueError, KeyError) as error:
        raise DataError(f"{file}: {error}; remove the file to do without checksums.") from error
    if what:
        raise DataError(
            f"{what}. Bring it back from a copy; or remove the run's result.json, and its command "
            f"exports the model anew. If you changed the file on purpose, remove {file}."
        )


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """Plain data with a checksum of its own, for a file that people read."""
    plain = {key: value for key, value in record.items() if key != _OWN}
    return {**plain, _OWN: text_sum(json.dumps(plain).encode())}


def opened(record: Any, before: Collection[str] | None = None) -> dict[str, Any]:
    """What `sealed` was given, or data from when there were no checksums.

    Args:
        record: as JSON was read.
        before: keys that such data has, if they are known.

    Raises:
        ValueError: it is not what was written.
    """
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
    plain = {key: value for key, value in record.items() if key != _OWN}
    if _OWN in record:
        if record[_OWN] != text_sum(json.dumps(plain).encode()):
            raise ValueError("it is not what was written: its checksum is another")
    elif before is not None and {*plain} != {*before}:
        raise ValueError(f"expected the keys {', '.join(before)}, got {', '.join(plain)}")
    return plain


def parse(data: bytes) -> Any:
    """JSON of a file.

    Raises:
        json.JSONDecodeError: it is none, or not UTF-8; knows the line.
    """
    try:
        return json.loads(data.decode())
    except UnicodeDecodeError as error:
        where = data.decode("latin-1"), error.start
        raise json.JSONDecodeError("not UTF-8", *where) from None


def read_lines(file: Path, data: bytes | None = None, *, growing: bool = False) -> list[Any]:
    """The JSON objects of a file, one a line.

    Args:
        data: what to read instead of the whole file.
        growing: whether somebody may be writing it: then a last line that is torn is left out.

    Raises:
        DataError: a line that is none; names file and line.
    """
    lines = (file.read_bytes() if data is None else data).splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = parse(line)
            if not isinstance(row, dict):
                raise ValueError(f"expected a JSON object, got {type(row).__name__}")
        except ValueError as error:
            if growing and number == len(lines):
                break
            raise DataError(
                f"{file}:{number}: not a line of {file.stem} ({error}). Remove the line, and what "
                "it told is missing; or bring the file back from a copy."
            ) from error
        rows.append(row)
    return rows


def text_sum(text: bytes) -> str:
    """Of what fits into memory."""
    return hashlib.blake2b(text, digest_size=8).hexdigest()


def _sum(file: Path) -> tuple[int, str]:
    import numpy as np

    size = file.stat().st_size
    flat = np.memmap(file, np.uint8, "r") if size else np.zeros(0, np.uint8)
    return size, checksum(flat)
