"""Atomic writes, full disks, and checksums of files.

Damaged files are named before they are used. Checksums detect damage, not tampering: whoever can
change a file can change its checksum too.
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
from rayrl.weights.flat import read_checksum

__all__ = [
    "Checksums",
    "check_weights",
    "checksum_of",
    "disk_is_full",
    "explain_full_disk",
    "file_checksums",
    "find_damage",
    "folder_size",
    "fsync",
    "parse",
    "read_jsonl",
    "verify_checksum",
    "with_checksum",
    "write_atomic",
    "write_weight_checksums",
]

Checksums = dict[str, tuple[int, str]]
"""Size in bytes and checksum of files, by their path within a folder."""

CHECKSUMS = "checksums.json"  # in a model's folder
_THREADS = 4
_KEY = "checksum"  # of a record's own checksum


def write_atomic(file: Path, data: bytes) -> None:
    """Replace the contents of `file`; a crash leaves either the old contents or the new ones."""
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
    fsync(file.parent)


def disk_is_full(error: Exception, path: Path) -> bool:
    """Tell whether a full disk caused `error`, which libraries wrap in errors of their own."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "No space left" in str(error) or shutil.disk_usage(path).free < 1 << 20


@contextmanager
def explain_full_disk(path: Path, what: str, then: str, needed: int = 0) -> Iterator[None]:
    """Explain errors of the block that a full disk causes.

    Args:
        path: a file or folder on that disk.
        what: is written, as "the checkpoint of step 4".
        then: what the same command does once there is space.
        needed: approximate size in bytes; 0 if unknown.

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
            f"{path}: the disk is full, so {what} was not saved ({needs}{_mib(free)} is free). "
            f"Free some space and run the same command again: {then}."
        ) from error


def folder_size(folder: Path) -> int:
    """Total size of the files in a folder in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def fsync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def file_checksums(folder: Path, pattern: str = "*") -> Checksums:
    """Compute the checksums of all files in a folder and its subfolders."""
    files = sorted(path for path in folder.rglob(pattern) if path.is_file())
    with ThreadPoolExecutor(_THREADS) as pool:
        sums = pool.map(read_checksum, files)
        return {str(file.relative_to(folder)): sum_ for file, sum_ in zip(files, sums, strict=True)}


def find_damage(folder: Path, sums: Mapping[str, Any]) -> str:
    """Describe the first file that differs from its checksum in `sums`; empty if none does."""
    for name, (size, _) in sums.items():  # sizes first: they need no reading
        file = folder / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != size:
            return f"{file} has {file.stat().st_size:,} bytes instead of {size:,}"
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(read_checksum, (folder / name for name in sums))
        for (name, (_, expected)), (_, actual) in zip(sums.items(), found, strict=True):
            if actual != expected:
                return f"{folder / name} holds other bytes than were written (checksum {actual})"
    return ""


def write_weight_checksums(model: Path) -> None:
    """Write the checksums of a model's weights to its folder."""
    if sums := file_checksums(model, "*.safetensors"):
        (model / CHECKSUMS).write_text(json.dumps(with_checksum({"files": sums}), indent=2) + "\n")


def check_weights(model: Path) -> None:
    """Compare a model's weights with the checksums in its folder, if it has any.

    Raises:
        DataError: a file is damaged; the message names it.
    """
    file = model / CHECKSUMS
    if not file.is_file():
        return
    try:
        damage = find_damage(model, verify_checksum(parse(file.read_bytes()))["files"])
    except (ValueError, KeyError) as error:
        raise DataError(f"{file}: {error}; remove the file to do without checksums.") from error
    if damage:
        raise DataError(
            f"{damage}. Restore it from a copy; or remove the run's result.json, and its command "
            f"exports the model again. If you changed the file on purpose, remove {file}."
        )


def with_checksum(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return `record` with a checksum of its contents under `checksum`."""
    plain = {key: value for key, value in record.items() if key != _KEY}
    return {**plain, _KEY: checksum_of(json.dumps(plain).encode())}


def verify_checksum(record: Any, legacy_keys: Collection[str] | None = None) -> dict[str, Any]:
    """Check and remove the checksum of a record; older versions wrote records without one.

    Args:
        record: parsed JSON.
        legacy_keys: the keys that a record without a checksum must have; None: any.

    Raises:
        ValueError: `record` is no object, or not what was written.
    """
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
    plain = {key: value for key, value in record.items() if key != _KEY}
    if _KEY in record:
        if record[_KEY] != checksum_of(json.dumps(plain).encode()):
            raise ValueError("it is not what was written: its checksum differs")
    elif legacy_keys is not None and {*plain} != {*legacy_keys}:
        raise ValueError(f"expected the keys {', '.join(legacy_keys)}, got {', '.join(plain)}")
    return plain


def parse(data: bytes) -> Any:
    """Parse JSON.

    Raises:
        json.JSONDecodeError: `data` is not JSON or not UTF-8.
    """
    try:
        return json.loads(data.decode())
    except UnicodeDecodeError as error:
        raise json.JSONDecodeError("not UTF-8", data.decode("latin-1"), error.start) from None


def read_jsonl(file: Path, data: bytes | None = None, *, growing: bool = False) -> list[Any]:
    """Read the JSON objects of a file, one per line.

    Args:
        data: bytes to parse instead of the file's contents.
        growing: the file may still be written: leave out a torn last line.

    Raises:
        DataError: a line is not a JSON object; the message names file and line.
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
                f"{file}:{number}: not a line of {file.stem} ({error}). Remove the line, "
                "which loses its contents, or restore the file from a copy."
            ) from error
        rows.append(row)
    return rows


def checksum_of(data: bytes) -> str:
    """Compute the checksum of data in memory."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()
