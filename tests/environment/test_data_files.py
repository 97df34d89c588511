from __future__ import annotations

import datetime
import json
import re
import sys
import types
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from rayrl.commands.folder_names import named
from rayrl.config import from_dict
from rayrl.environment.data_files import read_data
from rayrl.environment.registry import load_env
from rayrl.errors import DataError

TEXT = 'Is 3 < "π", or\nnot?'


def write(file: Path) -> Path:
    """Two rows: a text with quotes and a line break, and an integer."""
    rows = [{"q": TEXT, "a": 1}, {"q": "two", "a": 2}]
    if file.suffix == ".jsonl":
        file.write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)), "utf-8")
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows, indent=1), "utf-8")
    elif file.suffix == ".csv":
        quoted = TEXT.replace('"', '""')
        file.write_text(f'q,a\n"{quoted}",1\n\ntwo,2\n', "utf-8")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("d.jsonl", [":1", ":3"]),
        ("d.json", [": row 1", ": row 2"]),
        ("d.csv", [":2", ":5"]),  # the first row has two lines, and a blank one follows
        ("d.parquet", [": row 1", ": row 2"]),
    ],
)
def test_each_kind_of_file(tmp_path: Path, name: str, places: list[str]) -> None:
    file = write(tmp_path / name)
    found = list(read_data(file))
    one = "1" if name == "d.csv" else 1  # CSV has text only
    assert found[0].columns == {"q": TEXT, "a": one}
    assert [row.place for row in found] == [f"{file}{place}" for place in places]


def test_values_are_plain_data(tmp_path: Path) -> None:
    file = tmp_path / "d.parquet"
    row = {"day": datetime.date(2024, 2, 29), "raw": b"\xff\x00", "list": [{"x": None}]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), file)
    (found,) = read_data(file)
    assert found.columns == {"day": "2024-02-29", "raw": "_wA=", "list": [{"x": None}]}


def save_dataset(folder: Path, texts: list[str], **state: object) -> None:
    """What `datasets.Dataset.save_to_disk` writes, with one row per file."""
    folder.mkdir(parents=True)
    names = [f"data-{k:05}-of-{len(texts):05}.arrow" for k in range(len(texts))]
    for name, text in zip(names, texts, strict=True):
        table = pyarrow.table({"q": [text]})
        with (
            pyarrow.OSFile(str(folder / name), "wb") as sink,
            pyarrow.ipc.new_stream(sink, table.schema) as writer,
        ):
            writer.write_table(table)
    files = [{"filename": name} for name in names]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, **state}))


def test_a_saved_hugging_face_data_set(tmp_path: Path) -> None:
    save_dataset(tmp_path / "d" / "train", ["a", "b"])
    found = list(read_data(f"{tmp_path}/d/train"))
    assert [row.columns["q"] for row in found] == ["a", "b"]
    assert found[1].place == f"{tmp_path}/d/train: row 2"
    (tmp_path / "d" / "dataset_dict.json").write_text("{}")
    with pytest.raises(DataError, match=r"several splits; name one of them: .*/d/train"):
        list(read_data(f"{tmp_path}/d/"))
    save_dataset(tmp_path / "part", ["a"], _indices_files=[{"filename": "i.arrow"}])
    with pytest.raises(DataError, match=r"flatten_indices"):
        list(read_data(tmp_path / "part"))
    (tmp_path / "part" / "state.json").write_text('{"_data_files": [{"filename": "gone"}]}')
    with pytest.raises(DataError, match=r"part: cannot be read as a data set"):
        list(read_data(tmp_path / "part"))


def two_columns_of_one_name() -> bytes:
    sink = pyarrow.BufferOutputStream()
    column = pyarrow.array([1])
    pyarrow.parquet.write_table(pyarrow.table([column, column], names=["a", "a"]), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("d.jsonl", b'{"a": 1}\n{"a": \n', "d.jsonl:2: not valid JSON"),
        ("d.jsonl", b'{"a": 1}\n\n[1]\n', "d.jsonl:3: expected an object of columns, got '[1]'"),
        ("d.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "d.jsonl:2: not UTF-8"),
        ("d.jsonl", b'{"a": ' + b"1" * 5000 + b"}", "d.jsonl:1: not valid JSON: Exceeds"),
        ("d.jsonl", b"[" * 100_000, "d.jsonl:1: not valid JSON"),
        ("d.json", b'{"a": 1}', "d.json: expected a list of objects"),
        ("d.json", b'{"a": 1}\n{"a": 2}', "d.json:2: not valid JSON: Extra data; if every line"),
        ("d.json", b'[{"a": 1}, 2]', "d.json: row 2: expected an object of columns, got '2'"),
        ("d.csv", b"a,b\n1,2\n1,2,3\n", "d.csv:3: 3 cells, but the header has 2 columns"),
        ("d.csv", b"a,a\n1,2\n", "d.csv:1: the header has two columns 'a'"),
        ("d.csv", b"a,,b\n", "d.csv:1: column 2 of the header has no name"),
        ("d.csv", b'a,b\n1,"2\n', "d.csv:2: not valid CSV"),
        ("d.csv", b"a\n1\n\xff\n", "d.csv: not UTF-8"),
        ("d.parquet", b"PAR1", "d.parquet: not a parquet file"),
        ("d.parquet", two_columns_of_one_name(), "d.parquet: two columns are called 'a'"),
        ("d.txt", b"a", "d.txt: rows are read from .jsonl, .json, .csv, .parquet"),
    ],
)
def test_bad_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, complaint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content)
    with pytest.raises(DataError, match=re.escape(complaint)):
        list(read_data(name))


def test_files_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"no such file\. Did you mean 'train\.jsonl'"):
        list(read_data("trian.jsonl"))
    Path("sub").mkdir()
    Path("sub/x.parquet").write_text("")
    with pytest.raises(DataError, match=r"sub/: not a folder .*name one of its files, as x"):
        list(read_data("sub/"))


# --- the hub --------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """What is asked of the library `datasets`; a split "test" there is not."""
    calls: list[tuple[object, ...]] = []

    def load_dataset(
        name: str, config: str | None, *, revision: str | None, split: str
    ) -> list[dict[str, object]]:
        calls.append((name, config, revision, split))
        if split == "test":
            raise ValueError("Unknown split 'test'.\nThere is train.")
        return [{"q": "one", "day": datetime.date(2024, 2, 29)}, {"q": "two", "day": None}]

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_a_data_set_of_the_hub(asked: list[tuple[object, ...]]) -> None:
    rows = [(row.place, row.columns) for row in read_data("hf:me/sums")]
    assert rows == [
        ("hf:me/sums: row 1", {"q": "one", "day": "2024-02-29"}),
        ("hf:me/sums: row 2", {"q": "two", "day": None}),
    ]
    list(read_data("hf:me/sums/main@0f3a:validation"))
    assert asked == [
        ("me/sums", None, None, "train"),
        ("me/sums", "main", "0f3a", "validation"),
    ]
    env = load_env("hf:me/sums").configure({"prompt": "q", "answer": "q"})
    assert (env.name, env.spec.ref) == ("sums", "hf:me/sums")
    assert sorted(task["q"] for task in env.tasks(seed=0, n=2)) == ["one", "two"]  # type: ignore[index]
    config = from_dict({"env": {"name": "hf:me/sums:validation"}})
    assert named(config, {}, "train").run.dir == "runs/sums-validation-train"


def test_the_library_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks for a folder of that name before it asks the hub."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "me" / "sums"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text(
        '{"q": "1 + 1", "a": 2}\n{"q": "é \\ud83d\\ude00", "a": 3}\n'
    )
    (folder / "test.jsonl").write_text('{"q": "2 + 2", "a": 4}\n')
    found = [row.columns for row in read_data("hf:me/sums")]
    assert found == [{"q": "1 + 1", "a": 2}, {"q": "é 😀", "a": 3}]
    assert [row.columns["a"] for row in read_data("hf:me/sums:test")] == [4]
    with pytest.raises(DataError, match="hf:me/sums:dev: the Hugging Face hub does not give it"):
        list(read_data("hf:me/sums:dev"))
    saved = datasets.DatasetDict({"train": datasets.Dataset.from_list(found)})
    saved.save_to_disk("saved", num_shards={"train": 2})
    assert [row.columns for row in read_data("saved/train/")] == found
    picked = saved["train"].select([1])
    picked.save_to_disk("picked")
    assert [row.columns for row in read_data("picked/")] == found[1:]


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("hf:sums", "hf:sums: write hf:OWNER/NAME, and where"),
        ("hf:me/sums/a/b", "hf:me/sums/a/b: write hf:OWNER/NAME"),
        (
            "hf:me/sums:test",
            "does not give it: Unknown split 'test'. Where the hub",
        ),
    ],
)
def test_a_data_set_that_the_hub_does_not_give(
    asked: list[tuple[object, ...]], name: str, complaint: str
) -> None:
    with pytest.raises(DataError, match=re.escape(complaint)):
        list(read_data(name))


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"not installed; pip install 'rayrl\[hub\]'"):
        list(read_data("hf:me/sums"))


def test_a_cell_may_be_long(tmp_path: Path) -> None:
    file = tmp_path / "d.csv"
    file.write_text(f"a,b\n{'x' * 200_000},1\n")
    (row,) = read_data(file)
    assert len(row.columns["a"]) == 200_000
