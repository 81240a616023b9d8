"""Shards joined, found and split: what is missing is listed, and no sample is on both sides."""

import logging
import pickle
import shutil
from pathlib import Path

import pytest

from data.index import DataError, Index, IndexView, index_path, key_hash, open_split
from data.writer import write_shard


def test_folder_glob_braces_and_file_are_the_same(make_shard, tmp_path: Path) -> None:
    one, two = make_shard("s/00000.tar", 4), make_shard("s/00001.tar", 3, first=4)
    by_folder = Index.open(str(tmp_path / "s"))
    assert [header.shard for header in by_folder.headers] == [str(one), str(two)]
    assert len(by_folder) == 7
    for pattern in ("s/*.tar", "s/{00000..00001}.tar", "s/0000[01].tar"):
        assert Index.open(str(tmp_path / pattern)).fingerprint() == by_folder.fingerprint()
    assert len(Index.open(str(two))) == 3
    assert [by_folder.locate(i) for i in (0, 3, 4, 6)] == [(0, 0), (0, 3), (1, 0), (1, 2)]
    with pytest.raises(IndexError):
        by_folder.locate(7)


def test_the_fingerprint_is_of_the_content(make_shard, tmp_path: Path) -> None:
    make_shard("s/00000.tar", 4)
    first = Index.open(str(tmp_path / "s")).fingerprint()
    shutil.copytree(tmp_path / "s", tmp_path / "copy")
    assert Index.open(str(tmp_path / "copy")).fingerprint() == first
    make_shard("s/00000.tar", 4, first=1)
    assert Index.open(str(tmp_path / "s")).fingerprint() != first


def test_everything_missing_is_listed_at_once(make_shard, tmp_path: Path) -> None:
    shards = [make_shard(f"s/0000{i}.tar", 2, first=2 * i) for i in range(4)]
    shards[0].unlink()
    shards[2].unlink()
    shards[3].write_bytes(shards[3].read_bytes()[:-512])
    with pytest.raises(DataError) as caught:
        Index.open(str(tmp_path / "s"))
    assert "00000.tar: missing" in str(caught.value)
    assert "00002.tar: missing" in str(caught.value)
    assert "00003.tar: 9728 bytes, but its index says 10240" in str(caught.value)
    assert "00001.tar" not in str(caught.value)
    with pytest.raises(DataError, match=r"00009\.tar: missing"):
        Index.open(str(tmp_path / "s/{00001,00009}.tar"))


def test_missing_indexes_are_made(make_shard, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shard = make_shard("s/00000.tar")
    index_path(shard).unlink()
    with caplog.at_level(logging.INFO):
        index = Index.open(str(tmp_path / "s"))
    assert "made its index, 5 samples" in caplog.text
    assert index_path(shard).is_file()
    assert index.shard(0).key(2) == "00002"


def test_an_index_that_cannot_be_written_is_kept_in_memory(
    make_shard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shard = make_shard("s/00000.tar")
    index_path(shard).unlink()

    def refuse(index: object) -> Path:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("data.shard_index.write_index", refuse)
    index = Index.open(str(tmp_path / "s"))
    assert "kept in memory only (Permission denied)" in caplog.text
    assert pickle.loads(pickle.dumps(index)).shard(0).key(4) == "00004"


def test_keys_in_two_shards_are_refused(make_shard, tmp_path: Path) -> None:
    make_shard("s/00000.tar", 4)
    make_shard("s/00001.tar", 4, first=3)
    with pytest.raises(DataError, match=r"key '00003' occurs in .*00000\.tar and in .*00001\.tar"):
        Index.open(str(tmp_path / "s"))


def test_an_index_pickles_small_and_loads_again(make_shard, tmp_path: Path) -> None:
    make_shard("s/00000.tar", 200)
    index = Index.open(str(tmp_path / "s"))
    index.shard(0)
    data = pickle.dumps(index)
    assert len(data) < 3000
    assert pickle.loads(data).shard(0).key(199) == "00199"


@pytest.mark.parametrize("shards", ["pipe:touch X", "ftp://x/a.tar", "file:///etc/passwd", "pipe:{1,2}.tar"])
def test_schemes_are_refused(shards: str) -> None:
    with pytest.raises(DataError, match=r"only local files, http\(s\) and s3 are read"):
        Index.open(shards)


def test_nothing_to_read_says_what_to_type(tmp_path: Path, make_shard) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"x")
    make_shard("whole/train/00000.tar")
    cases = {
        "absent": r"absent: no such file or folder; .*python scripts/make_shards.py PICTURES OUT",
        "empty": r"the folder is empty; .*make_shards.py PICTURES .*empty",
        "photos": r"no \.tar among its 1 entries \(a\.jpg",
        "photos/a.jpg": r"no \.tar; name a shard",
        "photos/*.tar": r"no \.tar matches it",
        "whole": r"no \.tar in it, but in its folders train",
        "{0..": r"its braces do not match; write it as 'folder/",
    }
    for name, message in cases.items():
        with pytest.raises(DataError, match=message) as caught:
            open_split(str(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_a_hash_of_the_key_splits(make_shard, tmp_path: Path) -> None:
    make_shard("s/00000.tar", 400)
    make_shard("s/00001.tar", 400, first=400)
    train, val = open_split(str(tmp_path / "s"), 0.25)
    keys = [
        {view.sample(*view.locate(i))[0].key(view.sample(*view.locate(i))[1]) for i in range(len(view))}
        for view in (train, val)
    ]
    assert not keys[0] & keys[1]
    assert len(keys[0] | keys[1]) == 800
    assert 150 < len(keys[1]) < 250
    assert all(key_hash(key) < (1 << 62) for key in keys[1])
    assert train.fingerprint() != val.fingerprint()
    again = pickle.loads(pickle.dumps(val))
    assert again.counts == val.counts
    assert again.sample(1, 0)[1] == val.sample(1, 0)[1]


def test_adding_shards_moves_no_sample_across(make_shard, tmp_path: Path) -> None:
    make_shard("s/00001.tar", 100, first=100)
    _, before = open_split(str(tmp_path / "s"), 0.2)
    kept = before.rows(0).tolist()
    make_shard("s/00000.tar", 100)
    _, after = open_split(str(tmp_path / "s"), 0.2)
    assert after.rows(1).tolist() == kept


def test_a_folder_with_train_and_val_is_split_already(make_shard, tmp_path: Path) -> None:
    make_shard("s/train/00000.tar", 6)
    make_shard("s/val/00000.tar", 2, first=6)
    train, val = open_split(str(tmp_path / "s"), 0.5)
    assert (len(train), len(val)) == (6, 2)


def test_a_picture_on_both_sides_is_refused(make_shard, tmp_path: Path) -> None:
    make_shard("s/train/00000.tar", 6)
    make_shard("s/val/00000.tar", 2, first=5)
    with pytest.raises(DataError, match=r"key '00005' field jpg is the same picture in .*train.* and .*val"):
        open_split(str(tmp_path / "s"))


def test_a_key_on_both_sides_may_be_another_picture(tmp_path: Path) -> None:
    for side in ("train", "val"):
        (tmp_path / side).mkdir()
        write_shard(tmp_path / side / "0.tar", [("0", {"jpg": side.encode()})])
    assert len(open_split(str(tmp_path))[1]) == 1


def test_fractions_that_leave_one_side_empty(
    make_shard, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_shard("s/00000.tar", 3)
    train, val = open_split(str(tmp_path / "s"), 0.0)
    assert (len(train), len(val)) == (3, 0)
    open_split(str(tmp_path / "s"), 1e-6)
    assert "holds none out" in caplog.text
    with pytest.raises(DataError, match="leaves no training samples"):
        open_split(str(tmp_path / "s"), 1 - 1e-9)
    with pytest.raises(ValueError, match="val_fraction is 1"):
        open_split(str(tmp_path / "s"), 1.0)


def test_a_view_of_everything_is_the_index(make_shard) -> None:
    index = Index.open(str(make_shard()))
    view = IndexView(index)
    assert view.counts == index.counts
    assert [view.sample(*view.locate(i))[1] for i in range(5)] == list(range(5))
