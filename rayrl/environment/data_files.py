"""Read rows of data: JSONL, JSON, CSV, parquet, a Hugging Face data set, saved or of the hub."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter

from rayrl.config.registry import local_copy
from rayrl.errors import DataError, did_you_mean

__all__ = [
    "HUB",
    "SUFFIXES",
    "DataRow",
    "is_data_file",
    "parse_object",
    "read_data",
    "text_lines",
]

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
HUB = "hf:"  # before a data set of the Hugging Face hub
_HUB_NAME = re.compile(r"hf:([^/@:]+/[^/@:]+)(?:/([^/@:]+))?(?:@([^/@:]+))?(?::([^/@:]+))?")

_PLAIN: TypeAdapter[Any] = TypeAdapter(
    Any, config=ConfigDict(ser_json_bytes="base64", ser_json_inf_nan="constants")
)


@dataclass(frozen=True, slots=True)
class DataRow:
    """One row of a file.

    Attributes:
        place: file and line, for messages: `sums.jsonl:7`; the number of the row (from 1) where a
            file has no lines: `sums.parquet: row 7`.
        columns: plain data by column.
    """

    place: str
    columns: dict[str, Any]


def is_data_file(name: str) -> bool:
    """Whether `name` names data: of the hub, or by a file type or a folder's slash at its end."""
    return name.startswith(HUB) or name.endswith((*SUFFIXES, "/"))


def read_data(path: str | Path) -> Iterator[DataRow]:
    """Iterate over the rows of a file, a folder that `Dataset.save_to_disk` wrote, or the hub's.

    Args:
        path: or `hf:OWNER/NAME[/CONFIG][@REVISION][:SPLIT]`, whose split is train unless it says
            another.

    Raises:
        DataError: there is no such file, or it is malformed; names the file and the line. A data
            set of the hub cannot be had.
    """
    if str(path).startswith(HUB):
        yield from _hub_rows(str(path))
        return
    source, place = local_copy(str(path)), str(path)
    if source.is_dir():
        yield from _table_rows(_saved_dataset(source, place), place)
        return
    if source.suffix not in _READERS:
        kinds = ", ".join(SUFFIXES)
        raise DataError(f"{place}: rows are read from {kinds}, or a data set saved to a folder")
    if not source.is_file():
        near = did_you_mean(source.name, [file.name for file in source.parent.glob("*")])
        raise DataError(f"{place}: there is no such file.{near}")
    try:
        yield from _READERS[source.suffix](source, place)
    except OSError as error:
        raise DataError(f"{place}: cannot be read: {error.strerror or error}") from error


def text_lines(source: Path, place: str) -> Iterator[tuple[str, str]]:
    """Yield place and text of the lines that are not blank."""
    with source.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise DataError(f"{place}:{number}: not UTF-8") from None
            if text.strip():
                yield f"{place}:{number}", text


def parse_object(text: str, place: str) -> dict[str, Any]:
    """Parse the JSON object of a line."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{place}: not valid JSON: {error.msg} at column {error.colno}; a line is one object"
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, deep nesting
        raise DataError(f"{place}: not valid JSON: {error}") from None
    return _object(_without_nan(data), place)


def _without_nan(value: Any) -> Any:
    """Plain data with null for NaN, as which pandas writes what is missing."""
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, list):
        return [*map(_without_nan, value)]
    return None if isinstance(value, float) and math.isnan(value) else value


def _object(data: Any, place: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise DataError(f"{place}: expected an object of columns, got {str(data)[:40]!r}")
    return data


def _jsonl(source: Path, place: str) -> Iterator[DataRow]:
    for where, text in text_lines(source, place):
        yield DataRow(where, parse_object(text, where))


def _json(source: Path, place: str) -> Iterator[DataRow]:
    try:
        data = json.loads(source.read_bytes().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        hint = ""
        if error.msg == "Extra data":
            hint = "; if every line is an object, call the file .jsonl"
        raise DataError(f"{place}:{error.lineno}: not valid JSON: {error.msg}{hint}") from None
    except UnicodeDecodeError:
        raise DataError(f"{place}: not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not valid JSON: {error}") from None
    if not isinstance(data, list):
        raise DataError(f"{place}: expected a list of objects, got {str(data)[:40]!r}")
    for number, row in enumerate(data, 1):
        where = f"{place}: row {number}"
        yield DataRow(where, _object(_without_nan(row), where))


def _csv(source: Path, place: str) -> Iterator[DataRow]:
    csv.field_size_limit(max(csv.field_size_limit(), source.stat().st_size))
    with source.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        header: list[str] | None = None
        before = 0
        try:
            for cells in reader:
                where, before = f"{place}:{before + 1}", reader.line_num
                if not cells:
                    continue
                if header is None:
                    header = _header(cells, where)
                elif len(cells) != len(header):
                    raise DataError(
                        f"{where}: {len(cells)} cells, but the header has {len(header)} columns; "
                        'put text with commas or line breaks in "quotes"'
                    )
                else:
                    yield DataRow(where, dict(zip(header, cells, strict=True)))
        except csv.Error as error:
            raise DataError(f"{place}:{before + 1}: not valid CSV: {error}") from None
        except UnicodeDecodeError:
            raise DataError(f"{place}: not UTF-8, after line {before}") from None


def _header(cells: list[str], where: str) -> list[str]:
    for number, name in enumerate(cells, 1):
        if not name.strip():
            raise DataError(f"{where}: column {number} of the header has no name")
        if cells.index(name) != number - 1:
            raise DataError(f"{where}: the header has two columns {name!r}")
    return cells


def _parquet(source: Path, place: str) -> Iterator[DataRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(source) as file:
            table = file.read()
    except pyarrow.ArrowException as error:
        raise DataError(f"{place}: not a parquet file: {str(error).splitlines()[0]}") from None
    yield from _table_rows(table, place)


def _table_rows(table: Any, place: str) -> Iterator[DataRow]:
    for name in table.column_names:
        if table.column_names.count(name) > 1:
            raise DataError(f"{place}: two columns are called {name!r}")
    for number, columns in enumerate(table.to_pylist(), 1):
        plain = _PLAIN.dump_python(columns, mode="json")
        yield DataRow(f"{place}: row {number}", _without_nan(plain))


def _hub_rows(place: str) -> Iterator[DataRow]:
    """The rows of a data set of the Hugging Face hub, by the library `datasets`."""
    found = _HUB_NAME.fullmatch(place)
    if found is None:
        raise DataError(
            f"{place}: write hf:OWNER/NAME, and where there are several, the configuration and the "
            "split, as hf:OWNER/NAME/CONFIG:test"
        )
    name, config, revision, split = found.groups()
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(
            f"{place}: the library datasets is not installed; pip install 'rayrl[hub]'"
        ) from None
    try:
        rows = load_dataset(name, config, revision=revision, split=split or "train")
    except Exception as error:  # of the network, of the hub, of the data: they share no class
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{place}: the Hugging Face hub does not give it: {why.rstrip('.')}. Where the hub is "
            "out of reach, save it elsewhere with Dataset.save_to_disk and name the folder"
        ) from error
    for number, columns in enumerate(rows, 1):
        plain = _PLAIN.dump_python(columns, mode="json")
        yield DataRow(f"{place}: row {number}", _without_nan(plain))


def _saved_dataset(folder: Path, place: str) -> Any:
    """The table of a data set that the library `datasets` saved, which is not needed to read it."""
    import pyarrow

    if (folder / "dataset_dict.json").is_file():
        parts = sorted(part.parent.name for part in folder.glob("*/state.json"))
        name = place.rstrip("/")
        listed = ", ".join(f"{name}/{part}" for part in parts)
        raise DataError(f"{place}: a data set with several splits; name one of them: {listed}")
    if not (folder / "state.json").is_file():
        known = sorted(p.name for p in folder.rglob("*") if p.suffix in SUFFIXES)[:3]
        hint = f"; name one of its files, as {', '.join(known)}" if known else ""
        raise DataError(f"{place}: not a folder that Dataset.save_to_disk wrote{hint}")
    try:
        state = json.loads((folder / "state.json").read_bytes())
        if state.get("_indices_files") or state.get("_indices_data_files"):
            raise DataError(f"{place}: call flatten_indices() before save_to_disk()")
        tables = []
        for file in state["_data_files"]:
            with pyarrow.memory_map(str(folder / file["filename"])) as data:
                tables.append(pyarrow.ipc.open_stream(data).read_all())
        return pyarrow.concat_tables(tables)
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        raise DataError(f"{place}: cannot be read as a data set: {error}") from error


_READERS: dict[str, Callable[[Path, str], Iterator[DataRow]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
