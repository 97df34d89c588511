"""Files that records are appended to, and that a killed process or a power cut leaves readable.

A record is plain data as MessagePack, behind a mark, its length and its CRC-32. It is written at
once: a process that is killed afterwards has not lost it. Whatever stands behind the last whole
record (a torn one, zeros of a power cut) is cut off; damage in front of a whole record is an error.
Reading a file never runs anything that it holds.
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
_HEAD = struct.Struct(">4sII")  # mark, length and checksum of what follows
_PICKLE = b"\x80\x05"  # how records began before there was a mark, behind four bytes of length
_REMEDY = "remove the file, and what it held is played again"


def pack(data: object, default: Callable[[Any], Any] | None = None) -> bytes:
    """Plain data as bytes; `default` makes plain data of anything else."""
    packed: bytes = msgpack.packb(data, default=default, unicode_errors="surrogatepass")
    return packed


def unpack(data: bytes) -> Any:
    """What `pack` was given; its tuples are lists now.

    Raises:
        ValueError: these bytes are not from `pack`.
    """
    return msgpack.unpackb(data, unicode_errors="surrogatepass", strict_map_key=False)


class Records:
    """One such file, opened to append; what is there stays.

    Attributes:
        file: where.
        size: bytes of whole records.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        # unbuffered: what a full disk did not take must not be tried again when the file is closed
        self._out: FileIO = file.open("ab", buffering=0)
        self.size = os.fstat(self._out.fileno()).st_size

    def read(self) -> list[Any]:
        """All of them, with lists for tuples; what follows the last whole one is cut off.

        Raises:
            DataError: damage in front of a whole record, or a file of an earlier version.
        """
        data = self.file.read_bytes()
        records = []
        at = 0
        while (body := _body(data, at)) is not None:
            records.append(unpack(body))
            at += _HEAD.size + len(body)
        if at < len(data):
            self._refuse(data, at)
            print(
                f"{self.file}: the last {len(data) - at} bytes are not a whole record; they were "
                "cut off, and what they held is played again.",
                file=sys.stderr,
            )
            self.cut(at)
        return records

    def _refuse(self, data: bytes, at: int) -> None:
        """Raise DataError unless nothing but a damaged tail begins at this byte."""
        if data[at + 4 : at + 6] == _PICKLE:
            raise DataError(
                f"{self.file}, byte {at}: a pickle, as earlier versions of rayrl wrote it. It is "
                f"not read, because reading a pickle can run code; {_REMEDY}."
            )
        if not at and not _MARK.startswith(data[:4]) and data.strip(b"\0"):
            raise DataError(f"{self.file}, byte 0: not records of what was played; {_REMEDY}.")
        later = data.find(_MARK, at + 1)
        while later >= 0 and _body(data, later) is None:
            later = data.find(_MARK, later + 1)
        if later >= 0:
            raise DataError(
                f"{self.file}, byte {at}: {later - at} damaged bytes in front of whole records; "
                f"{_REMEDY}."
            )

    def add(self, record: object) -> None:
        """Append one, which must be plain data; on an error nothing of it is there."""
        body = pack(record)
        left = memoryview(_HEAD.pack(_MARK, len(body), zlib.crc32(body)) + body)
        size = self.size + len(left)
        try:
            while left:
                left = left[self._out.write(left) :]
        except OSError:
            self.cut(self.size)
            raise
        self.size = size

    def cut(self, size: int) -> None:
        """Keep so many bytes."""
        os.truncate(self._out.fileno(), size)
        self.size = size

    def close(self) -> None:
        """Close the file."""
        self._out.close()


def _body(data: bytes, at: int) -> bytes | None:
    """The body of the record that begins at this byte; None unless a whole one does."""
    if at + _HEAD.size > len(data):
        return None
    mark, size, checksum = _HEAD.unpack_from(data, at)
    body = data[at + _HEAD.size : at + _HEAD.size + size]
    whole = mark == _MARK and len(body) == size and zlib.crc32(body) == checksum
    return body if whole else None
