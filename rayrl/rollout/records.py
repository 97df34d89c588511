"""Append-only record files that stay readable after a killed process or a power cut.

A record is plain data as MessagePack, preceded by a marker, its length and its CRC-32. It is
written immediately, so a process that is killed afterwards does not lose it. Anything after the
last intact record (a torn record, zeros from a power cut) is cut off; damage before an intact
record is an error. Reading a file never executes its content.
"""

from __future__ import annotations

import os
import struct
import sys
import zlib
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped]

from rayrl.errors import DataError

__all__ = ["Records", "pack", "unpack"]

_MARK = b"rec\x01"
_HEAD = struct.Struct(">4sII")  # marker, length and checksum of the body
_PICKLE = b"\x80\x05"  # in earlier versions, follows four bytes of length
_REMEDY = "remove the file; the episodes in it are played again"


def pack(data: object, default: Callable[[Any], Any] | None = None) -> bytes:
    """Encode plain data as bytes; `default` converts other values to plain data."""
    packed: bytes = msgpack.packb(data, default=default, unicode_errors="surrogatepass")
    return packed


def unpack(data: bytes) -> Any:
    """Decode bytes from `pack`; tuples become lists.

    Raises:
        ValueError: the bytes are not from `pack`.
    """
    return msgpack.unpackb(data, unicode_errors="surrogatepass", strict_map_key=False)


class Records:
    """A record file, opened for appending.

    Attributes:
        file: its path.
        size: bytes of intact records.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        # unbuffered, so that closing the file does not retry a write that failed on a full disk
        self._out: FileIO = file.open("ab", buffering=0)
        self.size = os.fstat(self._out.fileno()).st_size

    def read(self) -> list[Any]:
        """Return all records, with lists for tuples; cut off anything after the last intact one.

        Raises:
            DataError: damage before an intact record, or a file of an earlier version.
        """
        data = self.file.read_bytes()
        records = []
        at = 0
        while (body := _body(data, at)) is not None:
            records.append(unpack(body))
            at += _HEAD.size + len(body)
        if at < len(data):
            self._check_tail(data, at)
            print(
                f"{self.file}: the last {len(data) - at} bytes are not a complete record; they "
                "were cut off, and the episodes in them are played again.",
                file=sys.stderr,
            )
            self.truncate(at)
        return records

    def _check_tail(self, data: bytes, at: int) -> None:
        """Raise DataError unless the data from byte `at` is merely a damaged tail."""
        if data[at + 4 : at + 6] == _PICKLE:
            raise DataError(
                f"{self.file}, byte {at}: a pickle, as written by earlier versions of rayrl. It is "
                f"not read, because reading a pickle can run code; {_REMEDY}."
            )
        if not at and not _MARK.startswith(data[:4]) and data.strip(b"\0"):
            raise DataError(f"{self.file}, byte 0: not a record file; {_REMEDY}.")
        later = data.find(_MARK, at + 1)
        while later >= 0 and _body(data, later) is None:
            later = data.find(_MARK, later + 1)
        if later >= 0:
            raise DataError(
                f"{self.file}, byte {at}: {later - at} damaged bytes before intact records; "
                f"{_REMEDY}."
            )

    def add(self, record: object) -> None:
        """Append a record of plain data; on an error nothing of it remains in the file."""
        body = pack(record)
        left = memoryview(_HEAD.pack(_MARK, len(body), zlib.crc32(body)) + body)
        size = self.size + len(left)
        try:
            while left:
                left = left[self._out.write(left) :]
        except OSError:
            self.truncate(self.size)
            raise
        self.size = size

    def truncate(self, size: int) -> None:
        """Truncate the file to `size` bytes."""
        os.truncate(self._out.fileno(), size)
        self.size = size

    def close(self) -> None:
        """Close the file."""
        self._out.close()


def _body(data: bytes, at: int) -> bytes | None:
    """Return the body of the record that begins at byte `at`; None if no intact one does."""
    if at + _HEAD.size > len(data):
        return None
    mark, size, checksum = _HEAD.unpack_from(data, at)
    body = data[at + _HEAD.size : at + _HEAD.size + size]
    intact = mark == _MARK and len(body) == size and zlib.crc32(body) == checksum
    return body if intact else None
