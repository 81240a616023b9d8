"""Finished pictures: a folder of PNGs with their records, newest first, the latest ones in memory.

    20261126-115804-123456-9f2c01aa.png     its record inside, as `sample.py` writes it
    20261126-115804-123456-9f2c01aa.json    the record alone

Pictures are written whole or not at all and never written over. What they take on the disk is bounded: the
oldest go first. Files of other names in the folder were made elsewhere: they are not shown, and stay. A name
from a page is looked up among those that are there and never becomes a path.
Use: `name = album.add(pixels, record)`, `album.png(name)`.
"""

import json
import re
import secrets
import threading
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from data.arrays import write_atomic
from data.pictures import Look, encode_picture, read_record
from data.shard_index import DataError

#: Bytes of pictures that are kept in memory, and on the disk.
MAX_BYTES, KEPT_BYTES = 64 << 20, 4 << 30
#: The names that are given here.
NAME = re.compile(r"\d{8}-\d{6}-\d{6}-[0-9a-f]{8}")


class Album:
    """The pictures in `folder`, which is made where it is missing; may be used from several threads.

    Args:
        folder: of the pictures and records.
        max_bytes: of pictures that are kept in memory.
        kept_bytes: of pictures that stay on the disk, the newest ones; the last one stays whatever it weighs.

    Raises OSError where the folder cannot be made or read.
    """

    def __init__(self, folder: Path, max_bytes: int = MAX_BYTES, kept_bytes: float = KEPT_BYTES) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.max_bytes = max_bytes
        self.kept_bytes = kept_bytes
        self._lock = threading.Lock()
        found = [path for path in folder.glob("*.png") if NAME.fullmatch(path.stem)]
        self._sizes = {path.stem: path.stat().st_size for path in found}
        self._names = sorted(self._sizes)
        self._on_disk = sum(self._sizes.values())
        self._memory: OrderedDict[str, bytes] = OrderedDict()
        self._bytes = 0
        self._make_room()

    def __len__(self) -> int:
        return len(self._names)

    def add(self, pixels: Tensor, record: Mapping[str, Any]) -> str:
        """Returns the name of a picture, uint8 `[3 H W]`, once it is on the disk; raises OSError."""
        png = encode_picture(pixels, Look(), record)
        with self._lock:
            name = f"{datetime.now(UTC):%Y%m%d-%H%M%S-%f}-{secrets.token_hex(4)}"
            text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
            write_atomic(self.folder / f"{name}.json", text.encode())
            write_atomic(self.folder / f"{name}.png", png)
            insort(self._names, name)
            self._sizes[name] = len(png)
            self._on_disk += len(png)
            self._keep(name, png)
            self._make_room()
        return name

    def png(self, name: str) -> bytes:
        """Returns a picture's file; raises KeyError where there is none of that name."""
        with self._lock:
            if name in self._memory:
                self._memory.move_to_end(name)
                return self._memory[name]
            if not self._has(name):
                raise KeyError(name)
            try:
                png = (self.folder / f"{name}.png").read_bytes()
            except OSError:
                raise KeyError(name) from None
            self._keep(name, png)
            return png

    def latest(self, count: int, before: str | None = None) -> list[tuple[str, dict[str, Any]]]:
        """Returns names and records of `count` pictures, newest first, older than `before`.

        A picture whose record cannot be read has an empty one.
        """
        with self._lock:
            end = len(self._names) if before is None else bisect_left(self._names, before)
            names = self._names[max(0, end - count) : end]
        return [(name, self.record(name)) for name in reversed(names)]

    def record(self, name: str) -> dict[str, Any]:
        """Returns what made a picture, as it says itself; {} where that cannot be read."""
        try:
            record, _ = read_record(self.folder / f"{name}.png")
        except DataError:
            return {}
        record.pop("pixels_sha256", None)
        return record

    def _has(self, name: str) -> bool:
        place = bisect_left(self._names, name)
        return place < len(self._names) and self._names[place] == name

    def _make_room(self) -> None:
        """Removes the oldest pictures until the others weigh no more than is kept."""
        while self._on_disk > self.kept_bytes and len(self._names) > 1:
            name = self._names.pop(0)
            self._on_disk -= self._sizes.pop(name)
            self._bytes -= len(self._memory.pop(name, b""))
            for suffix in (".json", ".png"):  # the picture last: one without its record is found again
                (self.folder / f"{name}{suffix}").unlink(missing_ok=True)

    def _keep(self, name: str, png: bytes) -> None:
        self._memory[name] = png
        self._bytes += len(png)
        while self._bytes > self.max_bytes and len(self._memory) > 1:
            self._bytes -= len(self._memory.popitem(last=False)[1])
