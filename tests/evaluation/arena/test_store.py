"""The store: nothing counts twice, nothing is changed, nothing acknowledged is lost, damage is said."""

import io
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from data.shard_index import DataError
from evaluation.arena.blind import blind_png, chunks_of, pad_alike
from evaluation.arena.ledger import read_ledger
from evaluation.arena.store import ArenaStore, Ballot, Entrant, Entry, PromptRow, Showing, rebuild
from evaluation.arena.votes import Outcome, Vote

PROJECT = Path(__file__).resolve().parents[3]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with ArenaStore.create(tmp_path / "arena", 8, 8) as store:
        store.add([Entrant("a"), Entrant("b", "runs/b", '{"num_steps": 4}')], [PromptRow("p", "a sea")])
        for name in ("a", "b"):
            store.add_picture(name, "p", 0, blind_png(torch.zeros(3, 8, 8, dtype=torch.uint8)))
    return tmp_path / "arena"


@pytest.fixture
def store(folder: Path) -> Iterator[ArenaStore]:
    with ArenaStore.open(folder) as store:
        yield store


def showing(store: ArenaStore, number: int = 0, voter: str = "v", key: str = "") -> Showing:
    left, right = (picture.id for picture in store.pictures()[:2])
    return Showing(key or f"{voter}{number}", voter, number, left, right, 0.5, 100.0)


def ballot(shown: Showing, outcome: Outcome = Outcome.LEFT) -> Entry:
    vote = Vote("a", "b", outcome, "p", "sea", shown.voter, shown.number, 104.5, 0.5)
    return Entry(ballot=Ballot(shown, vote))


def cast(store: ArenaStore, voter: str) -> bool:
    shown = showing(store, voter=voter)
    assert store.commit([Entry(showing=shown)]) == [True]
    return store.commit([ballot(shown)])[0]


def test_a_vote_comes_back_as_it_was(folder: Path) -> None:
    with ArenaStore.open(folder) as store:
        assert cast(store, "v")
    with ArenaStore.open(folder) as store:
        assert store.votes() == [Vote("a", "b", Outcome.LEFT, "p", "sea", "v", 0, 104.5, 0.5)]
        assert store.entrants()[1] == Entrant("b", "runs/b", '{"num_steps": 4}')
        assert (store.width, store.height) == (8, 8)
        assert store.rows()[0]["seconds"] == 4.5


def test_a_showing_and_a_pair_count_once(store: ArenaStore) -> None:
    first = showing(store)
    assert store.commit([Entry(showing=first), ballot(first), ballot(first, Outcome.RIGHT)]) == [
        True, True, False,
    ]  # fmt: skip
    again = showing(store, 1)  # the same two pictures before the same voter
    assert store.commit([Entry(showing=again), ballot(again)]) == [True, False]
    assert store.commit([Entry(showing=showing(store, 1, key="x"))]) == [False]  # one number, one showing
    assert [vote.outcome for vote in store.votes()] == [Outcome.LEFT]
    assert cast(store, "w")


def test_fifty_threads_cast_one_vote(store: ArenaStore) -> None:
    first = showing(store)
    store.commit([Entry(showing=first)])
    kept: list[bool] = []
    threads = [threading.Thread(target=lambda: kept.extend(store.commit([ballot(first)]))) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(kept) == [False] * 49 + [True]
    assert len(store.votes()) == 1 == len(read_ledger(store.folder / "votes.jsonl"))


def test_pending_showings_are_those_without_a_vote_that_are_not_old(store: ArenaStore) -> None:
    one, other = showing(store), showing(store, voter="w")
    store.commit([Entry(showing=one), Entry(showing=other), ballot(one)])
    assert store.pending(200.0) == [other]
    assert store.pending(100.0 + 25 * 3600) == []
    assert store.is_voted(one.id)
    assert not store.is_voted(other.id)
    assert store.shown() == {"v": 1, "w": 1}


@pytest.mark.parametrize(
    "line", ["UPDATE votes SET outcome = 'right'", "DELETE FROM votes", "UPDATE votes SET voter = 'x'"]
)
def test_votes_are_never_changed(store: ArenaStore, line: str) -> None:
    cast(store, "v")
    other = sqlite3.connect(store.folder / "arena.db")
    with pytest.raises(sqlite3.IntegrityError, match="votes are never"), other:
        other.execute(line)
    other.close()


def test_what_a_crash_kept_from_the_ledger_is_caught_up(folder: Path) -> None:
    with ArenaStore.open(folder) as store:
        for voter in "abc":
            cast(store, voter)
    path = folder / "votes.jsonl"
    whole = path.read_bytes()
    for cut in (0, 10, whole.index(b"\n") + 1, len(whole) - 1):
        path.write_bytes(whole[:cut])
        ArenaStore.open(folder).close()
        assert path.read_bytes() == whole


@pytest.mark.parametrize("plant", ["change", "remove", "swap", "garbage"])
def test_a_ledger_that_was_tampered_with_is_refused(folder: Path, plant: str) -> None:
    with ArenaStore.open(folder) as store:
        for voter in "abc":
            cast(store, voter)
    path = folder / "votes.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    planted = {
        "change": [lines[0].replace(b'"left"', b'"right"', 1), *lines[1:]],
        "remove": [lines[0], lines[2]],
        "swap": [lines[1], lines[0], lines[2]],
        "garbage": [b"[]\n", *lines],
    }
    path.write_bytes(b"".join(planted[plant]))
    with pytest.raises(DataError, match=r"votes\.jsonl: line [12] "):
        ArenaStore.open(folder)


def test_the_votes_of_another_arena_are_refused(folder: Path, tmp_path: Path) -> None:
    with ArenaStore.open(folder) as store:
        cast(store, "v")
    with ArenaStore.create(tmp_path / "other", 8, 8):
        pass
    (tmp_path / "other" / "votes.jsonl").write_bytes((folder / "votes.jsonl").read_bytes())
    with pytest.raises(DataError, match="holds other votes"):
        ArenaStore.open(tmp_path / "other")


def test_a_disk_that_takes_no_more_lines_loses_no_vote(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with ArenaStore.open(folder) as store:
        cast(store, "a")
        with monkeypatch.context() as patch:
            patch.setattr("evaluation.arena.ledger.os.write", full)
            assert cast(store, "b")
        assert "No space left" in caplog.text
        assert cast(store, "c")
        assert [row["voter"] for row in read_ledger(folder / "votes.jsonl")] == ["a", "b", "c"]


def test_the_database_is_made_anew_from_the_ledger(folder: Path) -> None:
    with ArenaStore.open(folder) as store:
        for voter in "abc":
            cast(store, voter)
        votes = store.votes()
    path = folder / "arena.db"
    data = bytearray(path.read_bytes())
    data[4_096:] = os.urandom(len(data) - 4_096)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"arena\.db is damaged .*scripts/arena\.py rebuild"):
        ArenaStore.open(folder)
    assert rebuild(folder) == 3
    with ArenaStore.open(folder) as store:
        assert store.votes() == votes
        assert store.shown() == {"a": 1, "b": 1, "c": 1}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "arena.db").write_bytes(b"no database" * 900), "is damaged"),
        (lambda f: (f / "arena.db").unlink(), "there is no arena here"),
        (lambda f: _run(f, "PRAGMA user_version = 7"), "is of version 7, this program reads 1"),
        (lambda f: _run(f, "PRAGMA application_id = 7"), "another program"),
        (lambda f: (f / "secret").write_bytes(b"short"), "secret is damaged"),
    ],
)
def test_what_is_no_arena_of_ours_is_said(
    folder: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(folder)
    with pytest.raises(DataError, match=message):
        ArenaStore.open(folder)


def _run(folder: Path, line: str) -> None:
    database = sqlite3.connect(folder / "arena.db")
    database.execute(line)
    database.close()


def test_two_processes_do_not_write_one_arena_but_a_second_may_read(store: ArenaStore) -> None:
    cast(store, "v")
    with pytest.raises(DataError, match="open in another process"):
        ArenaStore.open(store.folder)
    with ArenaStore.open(store.folder, writes=False) as reader:
        assert len(reader.votes()) == 1


def test_the_secret_is_its_owners(folder: Path) -> None:
    assert stat.S_IMODE((folder / "secret").stat().st_mode) == 0o600
    with ArenaStore.open(folder) as one:
        secret = one.secret
    with ArenaStore.open(folder) as again:
        assert again.secret == secret


def test_what_is_there_is_kept_and_what_differs_is_refused(store: ArenaStore) -> None:
    store.add([Entrant("a")], [PromptRow("p", "a sea")])
    before = store.pictures()
    assert store.add_picture("a", "p", 0, b"another") == before[0]
    assert store.pictures() == before
    with pytest.raises(DataError, match="entrant b was"):
        store.add([Entrant("b", "runs/other")])
    with pytest.raises(DataError, match="prompt p was"):
        store.add([], [PromptRow("p", "another text")])


def test_a_store_has_one_size(folder: Path) -> None:
    with pytest.raises(DataError, match="are 8x8, not 16x8"):
        ArenaStore.create(folder, 16, 8)


CHILD = """
import sys
from pathlib import Path
from evaluation.arena.store import *
from evaluation.arena.votes import *
store = ArenaStore.open(Path(sys.argv[1]))
left, right = (picture.id for picture in store.pictures()[:2])
for k in range(10**6):
    shown = Showing(f"{sys.argv[2]}-{k}", f"{sys.argv[2]}-{k}", 0, left, right, 0.5, 1.0)
    vote = Vote("a", "b", Outcome.TIE, "p", "", shown.voter, 0, 2.0, 0.5)
    assert store.commit([Entry(showing=shown), Entry(ballot=Ballot(shown, vote))]) == [True, True]
    print(shown.id, flush=True)
"""


def test_kill_loses_nothing_that_was_acknowledged(folder: Path) -> None:
    told: list[str] = []
    for number in range(3):
        command = [sys.executable, "-c", CHILD, str(folder), str(number)]
        with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            for _ in range(15 + 7 * number):
                told.append(child.stdout.readline().strip())
            child.send_signal(signal.SIGKILL)
            told += child.stdout.read().split("\n")[:-1]
    with ArenaStore.open(folder) as store:
        kept = [row["token"] for row in store.rows()]
    assert len(told) > 60
    assert set(told) <= set(kept)
    assert len(kept) <= len(told) + 3  # one may have been kept before it could be said
    assert [row["token"] for row in read_ledger(folder / "votes.jsonl")] == kept


def test_a_blind_picture_is_pixels_alone_and_a_pair_has_one_length() -> None:
    flat = torch.zeros(3, 64, 64, dtype=torch.uint8)
    busy = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    one, other = blind_png(flat), blind_png(busy)
    assert chunks_of(one) == [b"IHDR", b"IDAT", b"IEND"]
    assert len(one) < len(other)
    left, right = pad_alike(one, other)
    assert len(left) == len(right)
    assert len(left) % 4_096 == 0
    assert chunks_of(left) == [b"IHDR", b"IDAT", b"paDt", b"IEND"]
    with Image.open(io.BytesIO(right)) as shown:
        shown.load()
        assert shown.info == {}
        assert shown.tobytes() == busy.permute(1, 2, 0).contiguous().numpy().tobytes()
