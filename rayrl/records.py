"""Files that records are appended to, and that a killed process leaves readable.

A record is a pickle behind its length. It is written at once: who is killed afterwards has not lost
it, and who is killed meanwhile leaves at most the last one torn, which is cut off.
"""

from __future__ import annotations

import os
import pickle
import struct
from io import FileIO
from pathlib import Path
from typing import Any

from rayrl.errors import DataError

__all__ = ["Records"]

_HEAD = struct.Struct(">I")


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
        """All of them; a torn last one is cut off.

        Raises:
            DataError: something that is no record.
        """
        records = []
        whole = 0
        data = self.file.read_bytes()
        while whole + _HEAD.size <= len(data):
            (size,) = _HEAD.unpack_from(data, whole)
            end = whole + _HEAD.size + size
            if end > len(data):
                break
            try:
                records.append(pickle.loads(data[whole + _HEAD.size : end]))
            except Exception as error:
                raise DataError(
                    f"{self.file}, byte {whole}: not a record of what was played ({error}); remove "
                    "the file, and what it held is played again."
                ) from error
            whole = end
        self.cut(whole)
        return records

    def add(self, record: object) -> None:
        """Append one; on an error nothing of it is there."""
        body = pickle.dumps(record, pickle.HIGHEST_PROTOCOL)
        left = memoryview(_HEAD.pack(len(body)) + body)
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
