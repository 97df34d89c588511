"""Files that a power cut or a full disk leaves whole, and their checksums.

A damaged file is named before anything is read from it. Checksums show damage, not malice: whoever
can change a file can change its checksum as well.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rayrl.errors import DataError, RunFailed
from rayrl.weights.flat import checksum

__all__ = [
    "Sums",
    "check_weights",
    "damage",
    "disk_is_full",
    "explain_full_disk",
    "opened",
    "parse",
    "read_lines",
    "seal_weights",
    "sealed",
    "size_of",
    "sums_of",
    "sync",
    "text_sum",
    "write_atomic",
]

Sums = dict[str, tuple[int, str]]
"""Bytes and checksum of files, by their path in a folder."""

SUMS = "checksums.json"  # in the folder of a model
_THREADS = 4
_OWN = "checksum"  # key of a record's own


def write_atomic(file: Path, data: bytes) -> None:
    """Write a file that is there whole, or as it was before, whatever happens meanwhile."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with partial.open("wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(file.parent)


def disk_is_full(error: Exception, path: Path) -> bool:
    """Whether `error` comes from a full disk; libraries wrap it in errors of their own."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "No space left" in str(error) or shutil.disk_usage(path).free < 1 << 20


@contextmanager
def explain_full_disk(path: Path, what: str, then: str, needed: int = 0) -> Iterator[None]:
    """While within, a full disk is an error that says what to do.

    Args:
        path: something on that disk.
        what: is written, as "the checkpoint of step 4".
        then: what the same command does once there is space.
        needed: about how many bytes it takes, where that is known.

    Raises:
        RunFailed: the disk is full.
    """
    try:
        yield
    except Exception as error:
        if not disk_is_full(error, path):
            raise
        free = shutil.disk_usage(path).free
        needs = f"it needs about {_mib(needed)}, and " if needed else ""
        raise RunFailed(
            f"{path}: the disk is full, so {what} was not kept ({needs}{_mib(free)} is free). "
            f"Free some space and run the same command again: {then}."
        ) from error


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


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
