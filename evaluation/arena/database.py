"""The files of an arena's folder below its rows: the database's schema and settings, the lock, the secret."""

import fcntl
import os
import secrets
import sqlite3
from contextlib import closing
from pathlib import Path

from data.shard_index import DataError

#: The system is in the way of the database, which may be whole.
Unusable = sqlite3.OperationalError
VERSION = 1
APPLICATION = 0x46A2E4A1
#: Seconds that a connection waits for another one that writes.
PATIENCE = 10.0
SCHEMA = """
CREATE TABLE about (width INTEGER NOT NULL, height INTEGER NOT NULL);
CREATE TABLE entrants (name TEXT PRIMARY KEY, checkpoint TEXT NOT NULL, options TEXT NOT NULL);
CREATE TABLE prompts (id TEXT PRIMARY KEY, text TEXT NOT NULL, category TEXT NOT NULL, voter TEXT NOT NULL);
CREATE TABLE pictures (
  id TEXT PRIMARY KEY, entrant TEXT NOT NULL REFERENCES entrants, prompt TEXT NOT NULL REFERENCES prompts,
  number INTEGER NOT NULL, UNIQUE (entrant, prompt, number)
);
CREATE TABLE showings (
  id TEXT PRIMARY KEY, voter TEXT NOT NULL, number INTEGER NOT NULL,
  left_picture TEXT NOT NULL REFERENCES pictures, right_picture TEXT NOT NULL REFERENCES pictures,
  propensity REAL, made REAL NOT NULL, UNIQUE (voter, number)
);
CREATE TABLE votes (
  seq INTEGER PRIMARY KEY AUTOINCREMENT, token TEXT NOT NULL UNIQUE, pair TEXT NOT NULL,
  left TEXT NOT NULL, right TEXT NOT NULL, outcome TEXT NOT NULL, prompt TEXT NOT NULL,
  category TEXT NOT NULL, voter TEXT NOT NULL, showing INTEGER NOT NULL, time REAL NOT NULL,
  propensity REAL, seconds REAL NOT NULL,
  UNIQUE (voter, pair)
);
CREATE TRIGGER votes_stay BEFORE UPDATE ON votes BEGIN SELECT RAISE(ABORT, 'votes are never changed'); END;
CREATE TRIGGER votes_last BEFORE DELETE ON votes BEGIN SELECT RAISE(ABORT, 'votes are never removed'); END;
"""


def read_secret(folder: Path) -> bytes:
    """Returns the store's secret, made where there is none, readable by its owner alone."""
    path = folder / "secret"
    try:
        made = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        secret = path.read_bytes()
        if len(secret) != 32:
            raise DataError(f"{path} is damaged; remove it, and voters begin anew") from None
        return secret
    with os.fdopen(made, "wb") as stream:
        stream.write(secret := secrets.token_bytes(32))
        stream.flush()
        os.fsync(stream.fileno())
    return secret


def make(folder: Path, width: int, height: int) -> None:
    """Writes an empty database whole: under another name, then renamed."""
    part = folder / f"arena.db.{os.getpid()}.part"
    try:
        with closing(connect(part)) as database:
            database.executescript(SCHEMA)
            database.execute("INSERT INTO about VALUES (?, ?)", (width, height))
            database.execute(f"PRAGMA application_id = {APPLICATION}")
            database.execute(f"PRAGMA user_version = {VERSION}")
            database.commit()
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        os.replace(part, folder / "arena.db")
    finally:
        for left in folder.glob(f"{part.name}*"):  # of a full disk, with its log
            left.unlink()


def connect(path: Path) -> sqlite3.Connection:
    """Returns a connection whose commits are on the disk when they return; raises sqlite3.Error."""
    database = sqlite3.connect(path, timeout=PATIENCE, check_same_thread=False)
    try:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        database.execute("PRAGMA foreign_keys = ON")
    except BaseException:
        database.close()
        raise
    return database


def remedy(error: Unusable) -> str | None:
    """What to do about an error that is no damage; None where the disk is full or fails."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_IOERR) & 0xFF  # the primary one
    return {
        sqlite3.SQLITE_BUSY: "another process holds it: wait until that has ended",
        sqlite3.SQLITE_READONLY: "give yourself the right to write there",
        sqlite3.SQLITE_CANTOPEN: "check that it can be read and written",
        sqlite3.SQLITE_ERROR: "it is no arena of this version: make another one",
    }.get(code)


def check(path: Path, database: sqlite3.Connection) -> None:
    """Raises DataError for another version, sqlite3.DatabaseError for what is damaged."""
    (application,) = database.execute("PRAGMA application_id").fetchone()
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if application != APPLICATION:
        raise DataError(f"{path} is the database of another program; give the folder of an arena")
    if version != VERSION:
        raise DataError(f"{path} is of version {version}, this program reads {VERSION}; make another arena")
    (found,) = database.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise sqlite3.DatabaseError(found)


def take_lock(folder: Path) -> int:
    """Returns the lock of a folder that one process holds; raises DataError where another has it."""
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise DataError(f"{folder} is open in another process; stop that one first") from None
    return lock


def release(lock: int | None) -> None:
    """Gives a lock back."""
    if lock is not None:
        os.close(lock)
