"""Pictures and their captions, from a table beside them or from one `.txt` beside each picture.

A table is JSON lines, CSV, TSV or Parquet; its image column holds paths relative to the table. Without a
table the folder is walked. Either way the result is a list of `Picture`s in a fixed order, each with a key
that depends on its path alone, so that adding pictures moves none across the held-out split.
`scripts/make_shards.py` packs them.
"""

import csv
import difflib
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.index import IMAGE_FIELDS, DataError

TABLES = tuple(
    f"{stem}.{end}" for stem in ("metadata", "captions") for end in ("jsonl", "csv", "tsv", "parquet")
)
SPLITS = {"train": "train", "training": "train"} | dict.fromkeys(("val", "valid", "validation", "dev"), "val")
SPLITS["test"] = "test"
DUPLICATE_COLUMN = "dup_of"

Row = dict[str, Any]


@dataclass(frozen=True)
class Columns:
    """Which columns of a table hold the picture's path, its caption and its split (maybe absent)."""

    image: str = "file_name"
    caption: str = "text"
    split: str = "split"


@dataclass(frozen=True)
class Picture:
    """A picture to pack: `name` is its path as the source writes it; `split` train, val, test or ""."""

    key: str
    path: Path
    name: str
    caption: str
    split: str
    record: dict[str, Any]


@dataclass(frozen=True)
class Skipped:
    """A picture that is left out, and why."""

    name: str
    reason: str


def find_table(source: Path) -> Path | None:
    """Returns the captions table in a folder, if there is one; raises DataError for several."""
    found = [source / name for name in TABLES if (source / name).is_file()]
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise DataError(f"{source}: {names} are both there; say which with --captions {found[0].name}")
    return found[0] if found else None


def read_pictures(
    source: Path,
    table: Path | None,
    columns: Columns,
    keep_duplicates: bool = False,
    keep_uncaptioned: bool = False,
) -> tuple[list[Picture], list[Skipped]]:
    """Returns the pictures of a folder in a fixed order, and those left out.

    Left out: rows whose file is missing or outside the folder, a file's second row, rows with `dup_of` set
    unless `keep_duplicates`, and pictures without a caption unless `keep_uncaptioned`. Raises DataError for a
    missing folder, an unreadable table, an absent column, an unknown split and for no pictures at all.
    """
    if not source.is_dir():
        raise DataError(f"{source}: no such folder; name the folder that holds the pictures")
    rows = _table_rows(source, table, columns) if table else _folder_rows(source, columns)
    pictures, skipped, seen = [], [], set()
    for row in rows:
        name = str(row.get(columns.image) or "")
        path = _inside(table.parent if table else source, source, name)
        caption = str(row.get(columns.caption) or "").strip()
        if path is None:
            skipped.append(Skipped(name, "the path leads out of the source folder"))
        elif path in seen:
            skipped.append(Skipped(name, "the same file was named before; only its first row is used"))
        elif row.get(DUPLICATE_COLUMN) and not keep_duplicates:
            skipped.append(Skipped(name, f"duplicate of {row[DUPLICATE_COLUMN]}"))
        elif not caption and not keep_uncaptioned:
            skipped.append(Skipped(name, "no caption"))
        elif not path.is_file():
            skipped.append(Skipped(name, "no such file"))
        else:
            seen.add(path)
            record = {
                k: v for k, v in row.items() if k not in (columns.caption, columns.split, DUPLICATE_COLUMN)
            }
            split = _split(row.get(columns.split), name)
            pictures.append(Picture(_key(name), path, name, caption, split, record))
    if not pictures:
        raise DataError(_nothing(source, skipped))
    return _unique_keys(pictures), skipped


def read_table(table: Path) -> list[Row]:
    """Returns a table's rows; raises DataError naming the line where it cannot be read."""
    try:
        match table.suffix.lower():
            case ".jsonl" | ".json":
                return list(_json_lines(table))
            case ".csv" | ".tsv":
                with table.open(encoding="utf-8-sig", newline="") as stream:
                    reader = csv.DictReader(stream, delimiter="\t" if table.suffix.lower() == ".tsv" else ",")
                    return [_csv_row(table, reader.line_num, row) for row in reader]
            case ".parquet":
                import pyarrow.parquet  # it takes half a second to import

                return pyarrow.parquet.read_table(table).to_pylist()
    except UnicodeDecodeError as error:
        raise DataError(f"{table}: no UTF-8 at byte {error.start}; save it as UTF-8") from error
    except (OSError, ValueError, csv.Error) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{table}: cannot be read ({reason[:200]}); write it again") from error
    raise DataError(f"{table}: tables are .jsonl, .csv, .tsv or .parquet; write it as one of them")


def _json_lines(table: Path) -> Iterator[Row]:
    with table.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{table} line {number}: bad JSON ({error}); correct that line") from error
            if not isinstance(row, dict):
                raise DataError(f"{table} line {number}: no JSON object; write one object a line")
            yield row


def _csv_row(table: Path, line: int, row: Row) -> Row:
    if None in row or None in row.values():
        raise DataError(
            f"{table} line {line}: more or fewer cells than the first line; quote cells with commas"
        )
    return row


def _table_rows(source: Path, table: Path, columns: Columns) -> list[Row]:
    rows = read_table(table)
    names = list(dict.fromkeys(name for row in rows for name in row))
    for option, column in (("--image-column", columns.image), ("--caption-column", columns.caption)):
        if rows and column not in names:
            raise DataError(f"{table}: no column {column!r}; {_did_you_mean(option, column, names)}")
    return rows


def _did_you_mean(option: str, column: str, names: list[str]) -> str:
    synonyms = {
        "text": ("caption", "captions", "prompt", "title"),
        "file_name": ("file", "filename", "image", "path"),
    }
    close = [name for name in names if name.lower() in synonyms.get(column, ())]
    close += difflib.get_close_matches(column, names, 1, 0.5)
    if close:
        return f"did you mean {option} {close[0]}? (columns: {', '.join(names[:20])})"
    return f"name one with {option} (columns: {', '.join(names[:20])})"


def _folder_rows(source: Path, columns: Columns) -> Iterator[Row]:
    """Yields a row for each picture below a folder, sorted by path; its caption is the `.txt` beside it."""
    is_split = (source / "train").is_dir() and (source / "val").is_dir()
    files: list[Path] = []
    for folder, folders, names in os.walk(source):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(folder, n) for n in names if Path(n).suffix.lower().removeprefix(".") in IMAGE_FIELDS]
    for path in sorted(files, key=lambda path: path.relative_to(source).as_posix()):
        row: Row = {columns.image: path.relative_to(source).as_posix(), columns.caption: _sidecar(path)}
        first = path.relative_to(source).parts[0]
        if is_split:
            row[columns.split] = first if first in ("train", "val") else "train"
        yield row


def _sidecar(path: Path) -> str:
    text = path.with_suffix(".txt")
    if not text.is_file():
        return ""
    # Bytes that are no UTF-8 are kept as surrogates: packing refuses that picture alone, and says why.
    return text.read_bytes().decode("utf-8-sig", "surrogateescape")


def _inside(base: Path, source: Path, name: str) -> Path | None:
    """Returns the file a row names, None where it lies outside the source folder."""
    path = Path(os.path.abspath(base / name))
    return path if name and path.is_relative_to(os.path.abspath(source)) else None


def _split(value: object, name: str) -> str:
    if value is None or value == "":
        return ""
    split = SPLITS.get(str(value).lower())
    if split is None:
        raise DataError(
            f"{name}: its split is {value!r}; write train, val or test, or name another --split-column"
        )
    return split


def _key(name: str) -> str:
    """Returns the key of a path: no dots, no slashes, no blanks."""
    stem = name.removeprefix("./").rpartition(".")[0] or name
    return re.sub(r"[^\w-]+", "_", re.sub(r"[/\\]+", "-", stem)).strip("-") or "picture"


def _unique_keys(pictures: list[Picture]) -> list[Picture]:
    """Returns the pictures, a hash of its path added to the key of each whose key is another's too."""
    counts = Counter(picture.key for picture in pictures)
    unique = []
    for p in pictures:
        tail = hashlib.blake2b(p.name.encode(), digest_size=4).hexdigest()
        key = p.key if counts[p.key] == 1 else f"{p.key}-{tail}"
        unique.append(Picture(key, p.path, p.name, p.caption, p.split, p.record))
    return unique


def _nothing(source: Path, skipped: Iterable[Skipped]) -> str:
    reasons = Counter(skip.reason for skip in skipped)
    if not reasons:
        return f"{source}: no pictures (jpg, jpeg, png, webp) below it; name the folder that holds them"
    reason, count = reasons.most_common(1)[0]
    advice = {
        "no caption": "put NAME.txt beside NAME.jpg, name a table with --captions, or --keep-uncaptioned",
        "no such file": "the table's paths must be relative to it; name the column with --image-column",
    }
    return f"{source}: nothing to pack, {count} times: {reason}; {advice.get(reason, 'correct the table')}"
