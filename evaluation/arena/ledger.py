"""The votes once more, as lines of JSON that are only ever added to, each sealed by the ones before it.

`votes.jsonl` is a copy for people, for other programs and for the day the database is damaged; the database
is the truth. Each line carries the SHA-256 of the line before it and of its own content, so that a line
that was changed, taken out or put in is found. Lines reach the disk before `append` returns. A last line that
a crash has cut is taken off. Use: `ledger = Ledger(path)`; `ledger.append(rows)`.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.shard_index import DataError

FIRST = "0" * 64


class Ledger:
    """An open `votes.jsonl`, made where there is none; raises DataError for one that was tampered with."""

    def __init__(self, path: Path) -> None:
        self.path = path
        rows, self.seal, length = _read(path)
        self.count = len(rows)
        self._stream = path.open("ab", buffering=0)
        if path.stat().st_size > length:
            os.ftruncate(self._stream.fileno(), length)
        os.fsync(self._stream.fileno())

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows, and returns when they are on the disk; raises OSError, then none of them is there."""
        lines, seal = [], self.seal
        for row in rows:
            seal = sealed(seal, row)
            lines.append(json.dumps({**row, "seal": seal}, ensure_ascii=False) + "\n")
        data = "".join(lines).encode()
        before = os.fstat(self._stream.fileno()).st_size
        try:
            written = 0
            while written < len(data):
                written += os.write(self._stream.fileno(), data[written:])
            os.fsync(self._stream.fileno())
        except OSError:
            os.ftruncate(self._stream.fileno(), before)
            raise
        self.seal = seal
        self.count += len(rows)

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a ledger, their seals compared; raises DataError where one is not right."""
    return _read(path)[0]


def sealed(before: str, row: Mapping[str, Any]) -> str:
    """Returns the SHA-256, in hex, of a row after the one whose seal is `before`."""
    text = json.dumps(row, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(f"{before}\n{text}".encode()).hexdigest()


def _read(path: Path) -> tuple[list[dict[str, Any]], str, int]:
    """Rows, the last seal, and the length in bytes of what is whole."""
    data = path.read_bytes() if path.exists() else b""
    length = data.rfind(b"\n") + 1
    rows: list[dict[str, Any]] = []
    seal = FIRST
    for number, line in enumerate(data[:length].splitlines(), start=1):
        try:
            row = json.loads(line)
            stated = row.pop("seal")
        except (ValueError, KeyError, AttributeError, TypeError):
            raise DataError(f"{path}: line {number} is no vote; restore the file from a copy") from None
        seal = sealed(seal, row)
        if seal != stated:
            raise DataError(
                f"{path}: line {number} was changed, or one before it added or removed; restore the file"
            )
        rows.append(row)
    return rows, seal, length
