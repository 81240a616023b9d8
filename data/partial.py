"""The bytes held of an object that is being fetched: on disk under a name that nobody reads, and their hash.

`<target>.part` holds them and `<target>.part.json` says which version of the object they are, so that a later
process can go on where this one was stopped. Use: `data.remote.download`.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from errno import EDQUOT, EFBIG, ENOSPC
from pathlib import Path
from typing import NoReturn

from data.store import CHUNK, StoreError

HTML = (b"<!doctype html", b"<html")
MISMATCHES = 2  # whole downloads that may differ from the index before the object is refused
INDEX_AGAIN = "index the shards again (scripts/index.py), or put the old file back"


class Partial:
    """The bytes held of an object, on disk as `<target>.part`, and their hash so far."""

    def __init__(self, target: Path, address: str) -> None:
        self.path = target.with_name(target.name + ".part")
        self.note = target.with_name(target.name + ".part.json")
        self.address = address
        self.held = 0
        self.version = ""
        self.digest = hashlib.sha256()
        self.mismatches = 0

    def recover(self) -> None:
        """Takes up what an earlier process left, where its note says which version of the object it is."""
        try:
            note = json.loads(self.note.read_text(encoding="utf-8"))
            if note["address"] != self.address or not isinstance(note["version"], str):
                return
            with self.path.open("rb") as stream:
                while chunk := stream.read(CHUNK):
                    self.digest.update(chunk)
                    self.held += len(chunk)
            self.version = note["version"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            self.clear()

    def clear(self) -> None:
        """Forgets all bytes, on disk too."""
        self.held, self.version, self.digest = 0, "", hashlib.sha256()
        self.note.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)

    def restart(self, version: str) -> None:
        """Begins anew with a version of the object; its note is on disk before the first byte is."""
        self.clear()
        self.version = version
        self.path.touch()
        self.note.write_text(json.dumps({"address": self.address, "version": version}), encoding="utf-8")

    def append(self, chunks: Iterable[bytes], whole: int | None) -> None:
        """Writes chunks until they end or are more than the whole."""
        with disk(self), self.path.open("ab") as stream:
            for chunk in chunks:
                if self.held == 0 and chunk.lstrip()[:14].lower().startswith(HTML):
                    refuse_html()
                stream.write(chunk)
                stream.flush()
                self.digest.update(chunk)
                self.held += len(chunk)
                if whole is not None and self.held > whole:
                    break

    def mismatch(self, reason: str) -> StoreError:
        """Returns the error of a whole object that is not the one indexed; it is fetched once more."""
        self.clear()
        self.mismatches += 1
        return StoreError(reason, INDEX_AGAIN, status=200, retry=self.mismatches < MISMATCHES)

    def accept(self, target: Path) -> None:
        """Gives the bytes their final name, durably."""
        with self.path.open("rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(self.path, target)
        self.note.unlink(missing_ok=True)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def disk(partial: Partial) -> Iterator[None]:
    """Names the file in what the disk refuses, as OSError; a full one gets the bytes' room back."""
    try:
        yield
    except OSError as error:
        if error.errno in (ENOSPC, EDQUOT, EFBIG):
            partial.clear()
            raise OSError(
                error.errno,
                f"{error.strerror}; free some, or give the cache of shards less room or another folder",
                str(partial.path),
            ) from error
        raise OSError(error.errno, error.strerror, error.filename or str(partial.path)) from error


def refuse_html() -> NoReturn:
    """Raises the StoreError of a page that came in place of a file."""
    raise StoreError(
        "an HTML page where a shard or index is expected: a page of login or error, or a folder",
        "open the address in a browser to see it, and name the file itself",
        200,
    )
