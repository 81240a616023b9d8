"""Views: what filters and duplicates leave, counts that are kept, identities that do not move."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from data.cache import ShardCache
from data.duplicates import DUPLICATES, write_duplicates
from data.index import DataError, Filter, Index, IndexView, diff, open_split
from data.writer import write_shard


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four shards of fifty samples with a score from 0 to 9."""
    (tmp_path / "s").mkdir()
    for n in range(4):
        samples = (
            (
                f"{n}-{i:03d}",
                {"jpg": b"x", "json": b'{"score": %d, "kind": "%s"}' % (i % 10, b"ab"[i % 2 : i % 2 + 1])},
            )
            for i in range(50)
        )
        write_shard(tmp_path / "s" / f"{n}.tar", samples)
    return tmp_path / "s"


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", 1 << 30)


def test_identities_of_plain_splits_do_not_move(folder: Path) -> None:
    train, val = open_split(str(folder), 0.25)
    fingerprint = train.index.fingerprint()
    import hashlib

    border = int(0.25 * 2**64)
    for view, low, high in ((train, border, 1 << 64), (val, 0, border)):
        assert view.fingerprint() == hashlib.sha256(f"{fingerprint} {low} {high}".encode()).hexdigest()
    lines = "".join(f"{header.sha256} {header.count}\n" for header in train.index.headers)
    assert fingerprint == hashlib.sha256(lines.encode()).hexdigest()


def test_filters_split_and_count(folder: Path, cache: ShardCache) -> None:
    train, val = open_split(str(folder), 0.25, where="score >= 5 and kind == 'a'", cache=cache)
    assert len(train) + len(val) == 4 * 10  # scores 6 and 8
    assert sum(len(train.rows(n)) for n in range(4)) == len(train)
    plain, _ = open_split(str(folder), 0.25)
    for n in range(4):
        assert set(train.rows(n)) <= set(plain.rows(n))
        assert not set(train.rows(n)) & set(val.rows(n))
    assert train.fingerprint() != plain.fingerprint()
    assert (
        train.fingerprint()
        == open_split(str(folder), 0.25, where="(score>=5) and kind=='a'")[0].fingerprint()
    )
    assert pickle.loads(pickle.dumps(train)).rows(2).tolist() == train.rows(2).tolist()


def test_counts_are_kept_and_a_damaged_file_is_made_again(
    folder: Path, cache: ShardCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    words = (str(folder), 0.25, "score > 3")
    first = [view.counts for view in open_split(*words, cache=cache)]
    loaded: list[int] = []
    load = Index.load
    monkeypatch.setattr(Index, "load", lambda self, n, names: loaded.append(n) or load(self, n, names))
    assert [view.counts for view in open_split(*words, cache=cache)] == first
    assert loaded == []
    kept = sorted((cache.folder / "views").iterdir())
    assert len(kept) == 2
    kept[0].write_bytes(kept[0].read_bytes()[:-1])
    assert [view.counts for view in open_split(*words, cache=cache)] == first
    assert loaded == [0, 1, 2, 3]
    assert "it is made again" in caplog.text
    loaded.clear()
    write_shard(folder / "4.tar", [("new", {"json": b'{"score": 9}'})])
    assert sum(sum(view.counts) for view in open_split(*words, cache=cache)) == sum(map(sum, first)) + 1


def test_nothing_left_names_the_clause(folder: Path) -> None:
    for where, message in (
        (
            "score >= 5 and kind == 'c'",
            r"where=.* keeps no sample: \"kind == 'c'\" keeps none of the 100 that",
        ),
        ("score > 9", r"'score > 9' keeps none of 200; ask for less"),
        ("score == 3 and kind == 'a'", r"\"kind == 'a'\" keeps none of the 20 that .* \(100 by itself\)"),
    ):
        with pytest.raises(DataError, match=message):
            open_split(str(folder), 0.1, where=where)
    with pytest.raises(DataError, match="did you mean score"):
        open_split(str(folder), where="scor > 1")


def test_duplicates_are_left_out_of_both_sides(folder: Path, cache: ShardCache) -> None:
    with pytest.raises(DataError, match=r"duplicates\.idx: missing, .* run `python scripts/index.py .*/s`"):
        open_split(str(folder), 0.25, unique=True, cache=cache)
    index = Index.open(str(folder))
    shards, rows = np.array([2, 0, 2]), np.array([49, 3, 7])
    write_duplicates(folder, index.fingerprint(), shards, rows, 4)
    train, val = open_split(str(folder), 0.25, unique=True, cache=cache)
    assert len(train) + len(val) == 197
    for view in (train, pickle.loads(pickle.dumps(train)), val):
        assert not {7, 49} & set(view.rows(2).tolist())
        assert 3 not in view.rows(0)
    assert train.fingerprint() != open_split(str(folder), 0.25)[0].fingerprint()
    with pytest.raises(DataError, match="needs a folder that"):
        open_split(str(folder / "*.tar"), unique=True)
    data = bytearray((folder / DUPLICATES).read_bytes())
    data[-1] ^= 1
    (folder / DUPLICATES).write_bytes(data)
    with pytest.raises(DataError, match=r"duplicates\.idx: damaged .*scripts/index.py"):
        open_split(str(folder), 0.25, unique=True)
    write_duplicates(folder, "of other shards", shards, rows, 4)
    with pytest.raises(DataError, match="the shards have changed since duplicates were looked for"):
        open_split(str(folder), 0.25, unique=True)


def test_a_view_describes_itself_and_its_changes(folder: Path) -> None:
    before = open_split(str(folder), 0.25)[0].describe()
    assert before["samples"] > 100
    assert before["shards"].keys() == {"0.tar", "1.tar", "2.tar", "3.tar"}
    write_shard(folder / "3.tar", [("other", {"json": b'{"score": 1}'})])
    now = open_split(str(folder), 0.25, where="score < 9")[0].describe()
    assert diff(before, now) == ["filter was none, now 'score < 9'", "~ 3.tar: 50 -> 1 samples, other bytes"]
    other = open_split(str(folder), 0.5)[0].describe()
    assert "split was 75.0000% of the keys" in diff(before, other)[0]


def test_a_leak_is_looked_for_once(folder: Path, cache: ShardCache, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "d").mkdir()
    (folder).rename(tmp_path / "d" / "train")
    (tmp_path / "d" / "val").mkdir()
    write_shard(tmp_path / "d" / "val" / "0.tar", [("held", {"jpg": b"x"})])
    open_split(str(tmp_path / "d"), cache=cache)
    monkeypatch.setattr(Index, "load", None)
    open_split(str(tmp_path / "d"), cache=cache)


def test_a_view_without_a_cache_counts_for_itself(folder: Path) -> None:
    view = IndexView(Index.open(str(folder)), where=Filter("kind == 'b'"))
    assert view.counts == (25, 25, 25, 25)
    assert view.locate(26) == (1, 1)
    assert view.sample(1, 1)[1] == 3
