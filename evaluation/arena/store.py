"""Where an arena lives: a folder with entrants, prompts, pictures, showings and votes.

    arena.db       SQLite in WAL mode with synchronous=FULL: the one source of truth
    votes.jsonl    its votes once more, see `evaluation.arena.ledger`
    secret         32 random bytes that sign cookies and votes, readable by its owner alone
    pictures/      PNGs without metadata, of one size, under opaque names

A vote is acknowledged when SQLite has committed it, which with these settings means that it is on the disk;
`kill -9` or a power cut at any moment loses none. The database is the truth and not the JSON lines, since
only it can say in one step that a vote is new, allowed and kept. A crash between the two leaves the lines
short, and they are caught up when the store is opened. Votes cannot be changed or removed: triggers refuse.
Use: `with ArenaStore.open(folder) as store: store.commit([Entry(ballot=ballot)])`.
"""

import logging
import os
import secrets
import sqlite3
import threading
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from data.arrays import write_atomic
from data.shard_index import DataError
from evaluation.arena.database import check, connect, make, read_secret, release, take_lock
from evaluation.arena.ledger import Ledger, read_ledger
from evaluation.arena.votes import Vote

log = logging.getLogger(__name__)

#: A pair that nobody voted on for so many seconds is no longer accepted.
SHOWING_SECONDS = 24 * 3600.0

_VOTE = (
    *("token", "pair", "left", "right", "outcome", "prompt", "category", "voter", "showing", "time"),
    *("propensity", "seconds"),
)
_INSERT_VOTE = f"INSERT INTO votes ({', '.join(_VOTE)}) VALUES ({', '.join('?' * len(_VOTE))})"


@dataclass(frozen=True)
class Entrant:
    """One that is voted on; `checkpoint` is empty for pictures made elsewhere, `options` are JSON."""

    name: str
    checkpoint: str = ""
    options: str = "{}"


@dataclass(frozen=True)
class PromptRow:
    """A prompt; one that a voter typed is for the eyes of this `voter` alone, "" is for all."""

    id: str
    text: str
    category: str = ""
    voter: str = ""


@dataclass(frozen=True)
class PictureRow:
    """Picture `number` of a prompt by an entrant; `id` is also the name of its file."""

    id: str
    entrant: str
    prompt: str
    number: int


@dataclass(frozen=True)
class Showing:
    """A pair of pictures before one voter: the `number`-th, from 0. Times are seconds since 1970, UTC."""

    id: str
    voter: str
    number: int
    left_picture: str
    right_picture: str
    propensity: float | None
    made: float

    @property
    def pair(self) -> str:
        """Names the two pictures in whatever order: what one voter votes on once."""
        return "|".join(sorted((self.left_picture, self.right_picture)))


@dataclass(frozen=True)
class Ballot:
    """A vote to be kept, of a showing that has been committed before."""

    showing: Showing
    vote: Vote


@dataclass(frozen=True)
class Entry:
    """What is committed in one step: a ballot or a showing."""

    ballot: Ballot | None = None
    showing: Showing | None = None


class ArenaStore:
    """An open store; used from several threads, one at a time."""

    def __init__(self, folder: Path, database: sqlite3.Connection, lock: int | None) -> None:
        self.folder = folder
        self.secret = read_secret(folder)
        self._database = database
        self._lock = lock
        self._turn = threading.Lock()
        self._unwritten: list[dict[str, Any]] = []
        self._ledger = Ledger(folder / "votes.jsonl") if lock is not None else None
        (self.width, self.height) = self._all("SELECT width, height FROM about")[0]
        if self._ledger is not None:
            self._catch_up(self._ledger)

    @classmethod
    def create(cls, folder: Path, width: int, height: int) -> Self:
        """Makes a store for pictures of that size and opens it.

        Raises DataError where there is one of another size, OSError where none can be made.
        """
        if not (folder / "arena.db").exists():
            (folder / "pictures").mkdir(parents=True, exist_ok=True)
            make(folder, width, height)
        store = cls.open(folder)
        if (store.width, store.height) != (width, height):
            size = f"{store.width}x{store.height}"
            store.close()
            raise DataError(f"{folder}: its pictures are {size}, not {width}x{height}; give another folder")
        return store

    @classmethod
    def open(cls, folder: Path, writes: bool = True) -> Self:
        """Opens a store; only one process at a time may open it to write.

        Raises DataError where there is none, or one that is damaged, of another version or in use, and
        sqlite3.OperationalError where the system is in the way, such as by a full disk.
        """
        path = folder / "arena.db"
        if not path.is_file():
            raise DataError(f"{folder}: there is no arena here; make one with scripts/arena.py make {folder}")
        lock = take_lock(folder) if writes else None
        database = None
        try:
            database = connect(path)
            check(path, database)
            return cls(folder, database, lock)
        except BaseException as error:
            if database is not None:
                database.close()
            release(lock)
            damaged = isinstance(error, sqlite3.DatabaseError | IndexError)
            if damaged and not isinstance(error, sqlite3.OperationalError):
                raise DataError(
                    f"{path} is damaged ({' '.join(str(error).split())}); its votes are also in votes.jsonl: "
                    f"scripts/arena.py rebuild {folder}"
                ) from None
            raise

    def close(self) -> None:
        """Closes all files."""
        with self._turn:
            if self._ledger is not None:
                self._ledger.close()
            self._database.close()
            release(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- entrants, prompts, pictures

    def entrants(self) -> list[Entrant]:
        """Returns the entrants in the order they came."""
        return [Entrant(*row) for row in self._all("SELECT * FROM entrants ORDER BY rowid")]

    def prompts(self) -> list[PromptRow]:
        """Returns the prompts in the order they came."""
        return [PromptRow(*row) for row in self._all("SELECT * FROM prompts ORDER BY rowid")]

    def pictures(self) -> list[PictureRow]:
        """Returns the pictures in the order they came."""
        return [PictureRow(*row) for row in self._all("SELECT * FROM pictures ORDER BY rowid")]

    def add(self, entrants: Iterable[Entrant] = (), prompts: Iterable[PromptRow] = ()) -> None:
        """Adds entrants and prompts; raises DataError where one is there under that name and differs."""
        with self._turn, self._database:
            for table, rows in (("entrants", entrants), ("prompts", prompts)):
                for row in rows:
                    values = tuple(asdict(row).values())
                    key = "name" if table == "entrants" else "id"
                    found = self._database.execute(f"SELECT * FROM {table} WHERE {key} = ?", values[:1])
                    there = found.fetchone()
                    if there is None:
                        marks = ", ".join("?" * len(values))
                        self._database.execute(f"INSERT INTO {table} VALUES ({marks})", values)
                    elif there != values:
                        raise DataError(
                            f"{self.folder}: {table[:-1]} {values[0]} was {there[1:]}, and is now "
                            f"{values[1:]}; give it another name, or make another arena"
                        )

    def add_picture(self, entrant: str, prompt: str, number: int, png: bytes) -> PictureRow:
        """Keeps a picture, and returns its row; the one that is there already is kept."""
        found = self._all(
            "SELECT * FROM pictures WHERE entrant = ? AND prompt = ? AND number = ?",
            (entrant, prompt, number),
        )
        if found:
            return PictureRow(*found[0])
        row = PictureRow(secrets.token_hex(16), entrant, prompt, number)
        write_atomic(self._picture_path(row.id), png)
        with self._turn, self._database:
            self._database.execute("INSERT INTO pictures VALUES (?, ?, ?, ?)", tuple(asdict(row).values()))
        return row

    def read_picture(self, picture: str) -> bytes:
        """Returns the PNG of a picture of `pictures`; raises OSError where its file is gone."""
        return self._picture_path(picture).read_bytes()

    def _picture_path(self, picture: str) -> Path:
        return self.folder / "pictures" / f"{picture}.png"

    # --- showings and votes

    def votes(self) -> list[Vote]:
        """Returns all votes in the order they were acknowledged."""
        return [Vote.from_dict(row) for row in self.rows()]

    def rows(self, after: int = 0) -> list[dict[str, Any]]:
        """Returns the votes after the first `after` ones as they are in votes.jsonl."""
        found = self._all(f"SELECT {', '.join(_VOTE)} FROM votes ORDER BY seq LIMIT -1 OFFSET ?", (after,))
        return [dict(zip(_VOTE, row, strict=True)) for row in found]

    def pending(self, now: float) -> list[Showing]:
        """Returns the showings that may still be voted on."""
        found = self._all(
            "SELECT s.* FROM showings s LEFT JOIN votes v ON v.token = s.id"
            " WHERE v.token IS NULL AND s.made > ? ORDER BY s.rowid",
            (now - SHOWING_SECONDS,),
        )
        return [Showing(*row) for row in found]

    def shown(self) -> dict[str, int]:
        """Returns how many pairs each voter was shown."""
        rows = "SELECT voter, number FROM showings UNION ALL SELECT voter, showing FROM votes"
        return dict(self._all(f"SELECT voter, MAX(number) + 1 FROM ({rows}) GROUP BY voter"))

    def is_voted(self, showing: str) -> bool:
        """Returns whether a showing has its vote."""
        return bool(self._all("SELECT 1 FROM votes WHERE token = ?", (showing,)))

    def commit(self, entries: Sequence[Entry]) -> list[bool]:
        """Keeps ballots and showings in one transaction; returns which of them are kept now, on the disk.

        Not kept is a second vote of a showing, or of a voter on two pictures. Raises sqlite3.Error where the
        disk does not take them; then none of them counts. Lines that the ledger cannot take follow later.
        """
        kept: list[bool] = []
        rows: list[dict[str, Any]] = []
        with self._turn:
            with self._database:
                for entry in entries:
                    try:
                        rows += self._insert(entry)
                        kept.append(True)
                    except sqlite3.IntegrityError:
                        kept.append(False)
            self._unwritten += rows
            self._write_ledger()
        return kept

    def _write_ledger(self) -> None:
        if not self._unwritten or self._ledger is None:
            return
        try:
            self._ledger.append(self._unwritten)
        except OSError as error:
            log.error("%s: %s; the votes are in arena.db, and follow here", self._ledger.path, error.strerror)
        else:
            self._unwritten = []

    def _insert(self, entry: Entry) -> list[dict[str, Any]]:
        if entry.showing is not None:
            values = tuple(asdict(entry.showing).values())
            self._database.execute(f"INSERT INTO showings VALUES ({', '.join('?' * 7)})", values)
        if entry.ballot is None:
            return []
        showing, vote = entry.ballot.showing, entry.ballot.vote
        seconds = round(vote.time - showing.made, 3)
        row = {**vote.to_dict(), "token": showing.id, "pair": showing.pair, "seconds": seconds}
        self._database.execute(_INSERT_VOTE, [row[name] for name in _VOTE])
        return [{name: row[name] for name in _VOTE}]

    def _catch_up(self, ledger: Ledger) -> None:
        """Writes what a crash kept from the ledger; a ledger of another arena is refused."""
        mine = self.rows()
        theirs = read_ledger(ledger.path)
        if theirs != mine[: len(theirs)]:
            ledger.close()
            raise DataError(
                f"{ledger.path} holds other votes than arena.db; move it away, and it is written anew, or "
                f"take its votes: scripts/arena.py rebuild {self.folder}"
            )
        if len(mine) > len(theirs):
            ledger.append(mine[len(theirs) :])

    def _all(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        with self._turn:
            return self._database.execute(query, values).fetchall()


def rebuild(folder: Path) -> int:
    """Makes the database anew from votes.jsonl; returns the number of votes.

    The old one is kept as `arena.db.old`. The votes count as before; entrants, prompts and pictures are to be
    made again. Raises DataError where votes.jsonl is not whole.
    """
    if not (folder / "votes.jsonl").is_file():
        raise DataError(f"{folder}: there is no votes.jsonl here to take votes from")
    rows = read_ledger(folder / "votes.jsonl")
    lock = take_lock(folder)
    try:
        width, height = _size_of(folder)
        for name in ("arena.db", "arena.db-wal", "arena.db-shm"):
            if (folder / name).exists():
                os.replace(folder / name, folder / f"{name}.old")
        make(folder, width, height)
        with closing(connect(folder / "arena.db")) as database, database:
            database.executemany(_INSERT_VOTE, [[row[name] for name in _VOTE] for row in rows])
    finally:
        release(lock)
    return len(rows)


def _size_of(folder: Path) -> tuple[int, int]:
    """The size of the pictures, read from one of them: bytes 16 to 24 of a PNG."""
    for path in sorted((folder / "pictures").glob("*.png")):
        head = path.read_bytes()[16:24]
        return int.from_bytes(head[:4], "big"), int.from_bytes(head[4:], "big")
    raise DataError(f"{folder}: it has no pictures to go by; export the votes of votes.jsonl by hand")
