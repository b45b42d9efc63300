"""Finds and reads the files that hold rows; knows file formats, not what columns mean.

A source is a `.jsonl`, `.json` or `.parquet` file, a folder (saved by the `datasets` library, or
holding `train.jsonl`, `train-00000-of-00002.parquet`, ...), or `folder@split`. Local paths come
first; only `owner/name@split` that is no local path is looked up on the Hugging Face hub.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl.utils.exits import Explained

if TYPE_CHECKING:
    import pyarrow

logger = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".json", ".parquet")
_SHARD = re.compile(r"(?P<split>.+?)(-\d{5}-of-\d{5})?\.(jsonl|json|parquet)")
_DATASETS_METADATA = ("dataset_info.json", "dataset_dict.json", "dataset_infos.json", "state.json")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_MARKS = {
    b"\xef\xbb\xbf": ("UTF-8", "tail -c +4 IN > OUT"),
    b"\xff\xfe": ("UTF-16", "iconv -f UTF-16 -t UTF-8 IN > OUT"),
    b"\xfe\xff": ("UTF-16", "iconv -f UTF-16 -t UTF-8 IN > OUT"),
}

LocatedRow = tuple[str, dict[str, Any]]
"""Where a row stands (`train.jsonl:381`, or `train.parquet row 380` from 0) and its columns."""


class DataError(Explained, ValueError):
    """A data file or setting with which no run may go on; the message says what to change."""


def read_source(source: str) -> tuple[Path, list[LocatedRow]]:
    """The folder that relative media paths start from, and all rows in order.

    Raises DataError naming file, line and column of what cannot be read.
    """
    base, at, split = source.rpartition("@")
    path, local = Path(source).expanduser(), Path(base).expanduser()
    if path.is_dir():
        return path, _read_folder(path, None)
    if path.exists():
        return path.parent, _read_file(path)
    if at and local.is_dir():
        return local, _read_folder(local, split)
    if at and local.exists():
        if split != "train":
            raise DataError(f"{source}: a single file has one split, 'train'; write {base}")
        return local.parent, _read_file(local)
    if at and _HUB_ID.fullmatch(base) and not base.endswith(SUFFIXES):
        return Path(), _read_hub(source, base, split)
    raise DataError(
        f"{source}: no such file or folder ({path.absolute()}); write a .jsonl, .json or .parquet "
        "file, a folder, folder@split, or owner/name@split of the Hugging Face hub"
    )


def _read_file(path: Path) -> list[LocatedRow]:
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: unknown file type {path.suffix!r}; use {', '.join(SUFFIXES)}")
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise DataError(f"{path}: is empty")
    if head.startswith(b"version https://git-lfs"):
        raise DataError(f"{path}: is a Git LFS pointer, not the data; run `git lfs pull`")
    if path.suffix == ".parquet":
        return _read_parquet(path)
    text = _decode(path)
    return list(_json_lines(path, text) if path.suffix == ".jsonl" else _json_file(path, text))


def _decode(path: Path) -> str:
    data = path.read_bytes()
    for mark, (name, repair) in _MARKS.items():
        if data.startswith(mark):
            raise DataError(
                f"{path}: starts with a {name} byte-order mark; save it as plain UTF-8: {repair}"
            )
    if b"\x00" in data[:4]:
        raise DataError(f"{path}: looks like UTF-16 without a mark; save it as plain UTF-8")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: byte {error.start} is not UTF-8; save the file as plain UTF-8"
        ) from error


def _json_lines(path: Path, text: str) -> Iterator[LocatedRow]:
    # Not splitlines(): JSON texts may hold characters such as U+2028 that it would split at.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{number}:{error.colno}: bad JSON: {error.msg}; each line of a "
                'jsonl file must be one whole object, such as {"problem": ..., "answer": ...}'
            ) from error
        yield _object(f"{path}:{number}", row)


def _json_file(path: Path, text: str) -> Iterator[LocatedRow]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.lineno > 1:  # JSON lines under the name .json
            yield from _json_lines(path, text)
            return
        raise DataError(f"{path}:{error.lineno}:{error.colno}: bad JSON: {error.msg}") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: holds one {type(rows).__name__}; expected a list of objects")
    for number, row in enumerate(rows):
        yield _object(f"{path} row {number}", row)


def _object(where: str, row: Any) -> LocatedRow:
    if not isinstance(row, dict):
        raise DataError(
            f"{where}: is a {type(row).__name__}; a row is an object with named columns"
        )
    return where, row


def _read_parquet(path: Path) -> list[LocatedRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file: {error}") from error
    return _table_rows(str(path), table)


def _table_rows(name: str, table: pyarrow.Table) -> list[LocatedRow]:
    return [(f"{name} row {i}", row) for i, row in enumerate(table.to_pylist())]


def _read_folder(folder: Path, split: str | None) -> list[LocatedRow]:
    if (folder / "dataset_dict.json").exists() or (folder / "dataset_info.json").exists():
        return _read_saved_dataset(folder, split)
    splits: dict[str, list[Path]] = {}
    for path in sorted([*folder.iterdir(), *folder.glob("data/*")]):
        match = _SHARD.fullmatch(path.name)
        if match and path.is_file() and path.name not in _DATASETS_METADATA:
            splits.setdefault(match["split"], []).append(path)
    if split is None and len(splits) == 1:
        split = next(iter(splits))
    if split not in splits:
        raise _wrong_split(folder, split, splits)
    return [row for path in splits[split] for row in _read_file(path)]


def _read_saved_dataset(folder: Path, split: str | None) -> list[LocatedRow]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: not a readable `datasets` folder: {error}") from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise _wrong_split(folder, split, loaded)
        loaded = loaded[split]
    elif split is not None:
        raise DataError(f"{folder}@{split}: the folder holds one split; write {folder}")
    # The arrow view keeps media as paths or bytes; the default one would decode images here.
    return _table_rows(str(folder), loaded.with_format("arrow")[:])


def _wrong_split(folder: Path, split: str | None, splits: Iterable[object]) -> DataError:
    found = sorted(str(name) for name in splits)
    if not found:
        return DataError(f"{folder}: holds no {', '.join(SUFFIXES)} file and no saved data set")
    problem = "has several splits" if split is None else f"has no split {split!r}"
    choices = ", ".join(f"{folder}@{name}" for name in found)
    return DataError(f"{folder}: {problem}; write one of {choices}")


def _read_hub(source: str, repository: str, split: str) -> list[LocatedRow]:
    import datasets
    from datasets.exceptions import DatasetsError

    logger.info("%s is no local path; reading it from the Hugging Face hub", source)
    try:
        loaded = datasets.load_dataset(repository, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"{source}: neither a local folder ({Path(repository).absolute()}) nor readable from "
            f"the Hugging Face hub as {repository!r} (HF_HUB_OFFLINE is respected): {error}"
        ) from error
    assert isinstance(loaded, datasets.Dataset)
    return _table_rows(source, loaded.with_format("arrow")[:])
