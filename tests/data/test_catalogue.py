"""The catalogue: a folder is read again only where it changed, and no damage or absence goes unseen."""

import os
import random
import shutil
from pathlib import Path

import pytest

from data.cache import ShardCache
from data.catalogue import CATALOGUE, Catalogue, read_catalogue, write_catalogue
from data.index import DataError, Index, index_path
from data.shard_index import build_index, read_index, read_summary, write_index
from data.writer import write_shard


@pytest.fixture
def folder(make_shard, tmp_path: Path) -> Path:
    """Three shards of four, three and two samples."""
    make_shard("s/00000.tar", 4)
    make_shard("s/00001.tar", 3, first=4)
    make_shard("s/00002.tar", 2, first=7)
    return tmp_path / "s"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards whose index's header is read."""
    seen: list[str] = []

    def watched(shard: Path) -> object:
        seen.append(Path(shard).name)
        return read_summary(shard)

    monkeypatch.setattr("data.opening.read_summary", watched)
    return seen


def test_only_what_changed_is_read_again(folder: Path, make_shard, reads: list[str]) -> None:
    first = Index.open(str(folder))
    assert reads == ["00000.tar", "00001.tar", "00002.tar"]
    assert (folder / CATALOGUE).is_file()
    reads.clear()
    again = Index.open(str(folder))
    assert reads == []
    assert again.fingerprint() == first.fingerprint()
    assert list(again.headers) == list(first.headers)
    make_shard("s/00001.tar", 3, first=20)
    make_shard("s/000005.tar", 1, first=30)
    changed = Index.open(str(folder))
    assert reads == ["000005.tar", "00001.tar"]
    assert changed.counts == (4, 1, 3, 2)
    assert changed.shard(2).key(0) == "00020"
    (folder / CATALOGUE).unlink()
    assert Index.open(str(folder)).fingerprint() == changed.fingerprint() != first.fingerprint()


def test_a_folder_that_is_copied_is_read_again_and_stays_the_same(folder: Path, tmp_path: Path) -> None:
    first = Index.open(str(folder)).fingerprint()
    shutil.copytree(folder, tmp_path / "t", copy_function=shutil.copyfile)
    assert Index.open(str(tmp_path / "t")).fingerprint() == first
    shutil.move(folder, tmp_path / "u")
    index = Index.open(str(tmp_path / "u"))
    assert index.headers[0].shard == str(tmp_path / "u" / "00000.tar")
    assert index.shard(0).key(0) == "00000"


def test_missing_shards_are_all_named(folder: Path) -> None:
    Index.open(str(folder))
    for name in ("00000.tar", "00002.tar"):
        (folder / name).unlink()
        index_path(folder / name).unlink()
    with pytest.raises(DataError, match=r"00000\.tar: missing; copy .*00002\.tar: missing; copy") as caught:
        Index.open(str(folder))
    assert "00001.tar" not in str(caught.value)
    assert f"delete {CATALOGUE}" in str(caught.value)
    (folder / CATALOGUE).unlink()
    assert Index.open(str(folder)).counts == (3,)


def test_a_changed_size_is_named_with_both(folder: Path) -> None:
    Index.open(str(folder))
    data = (folder / "00001.tar").read_bytes()
    for cut in range(0, len(data), 512):
        (folder / "00001.tar").write_bytes(data[:cut])
        with pytest.raises(DataError, match=rf"00001\.tar: {cut} bytes, but its index says {len(data)}"):
            Index.open(str(folder))


def test_an_index_that_is_not_the_one_listed_is_refused(folder: Path, make_shard) -> None:
    index, stat = Index.open(str(folder)), index_path(folder / "00001.tar").stat()
    make_shard("s/00001.tar", 3, first=24)
    os.utime(index_path(folder / "00001.tar"), ns=(stat.st_atime_ns, stat.st_mtime_ns))
    for stale in (index, Index.open(str(folder))):  # same size, same time: only the content tells
        with pytest.raises(
            DataError, match=r"00001\.tar\.idx: 3 samples of SHA-256 .* but the catalogue says"
        ):
            stale.shard(1)
    assert index.shard(2).key(0) == "00007"


def test_a_damaged_catalogue_is_made_again(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    right = Index.open(str(folder))
    data, draw = (folder / CATALOGUE).read_bytes(), random.Random(0)
    said = 0
    for bit in draw.sample(range(len(data) * 8), 60):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        (folder / CATALOGUE).write_bytes(damaged)
        caplog.clear()
        assert list(Index.open(str(folder)).headers) == list(right.headers)
        said += "it is made again" in caplog.text
    assert said > 40


def test_keys_in_two_shards_are_found_when_one_is_added(folder: Path, make_shard) -> None:
    Index.open(str(folder))
    make_shard("s/00003.tar", 3, first=6)
    with pytest.raises(
        DataError, match=r"key '0000[678]' occurs in .*0000[12].tar and in .*00003.tar \(3 such keys\)"
    ):
        Index.open(str(folder))


def test_old_indexes_are_made_again(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    fingerprint = Index.open(str(folder)).fingerprint()
    monkeypatch.setattr("data.shard_index.INDEX_VERSION", 1)
    write_index(build_index(folder / "00001.tar"))
    monkeypatch.undo()
    with pytest.raises(DataError, match="index_version 1, this program reads 2"):
        read_index(folder / "00001.tar")
    assert Index.open(str(folder)).fingerprint() == fingerprint
    assert caplog.text == ""
    assert read_index(folder / "00001.tar").count == 3


def test_damaged_shards_stay_left_out(folder: Path, make_shard, caplog: pytest.LogCaptureFixture) -> None:
    indexes = [read_index(folder / name) for name in ("00000.tar", "00002.tar")]
    stamps = [index.header.index.stat().st_mtime_ns for index in indexes]
    listed = Catalogue.of(indexes, folder, stamps)
    write_catalogue(Catalogue(folder, listed.arrays, listed.schemas, True, ("00001.tar",)))
    (folder / "00001.tar").write_bytes(b"damaged")
    assert Index.open(str(folder)).counts == (4, 2)
    assert "1 damaged shards are left out (00001.tar)" in caplog.text
    make_shard("s/00003.tar", 1, first=50)
    assert Index.open(str(folder)).counts == (4, 2, 1)
    kept = read_catalogue(folder)
    assert kept is not None
    assert kept.left_out == ("00001.tar",)


def elsewhere(folder: Path, out: Path, address: str) -> None:
    """Writes catalogue and indexes of the folder's shards as if they lay elsewhere."""
    out.mkdir()
    indexes = []
    for number, shard in enumerate(sorted(folder.glob("*.tar"))):
        index = build_index(shard, f"{address}/{shard.name}", out / f"{number:05d}-{shard.name}.idx")
        write_index(index)
        indexes.append(index)
    write_catalogue(Catalogue.of(indexes, out))


def test_a_folder_that_names_remote_shards_opens_without_a_request(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere(folder, tmp_path / "out", "https://example.org/p")
    monkeypatch.setattr("socket.socket", None)
    index = Index.open(str(tmp_path / "out"))
    assert index.headers[1].shard == "https://example.org/p/00001.tar"
    assert index.headers[1].remote
    assert index.shard(1).key(0) == "00004"
    assert index.fingerprint() == Index.open(str(folder)).fingerprint()
    for number in (0, 2):
        (tmp_path / "out" / f"0000{number}-0000{number}.tar.idx").unlink()
    with pytest.raises(DataError, match=r"00000-.*: missing; .*scripts/index\.py.*00002-.*: missing"):
        Index.open(str(tmp_path / "out"))
    (tmp_path / "out" / CATALOGUE).write_bytes(b"x")
    with pytest.raises(DataError, match=r"catalogue\.idx: .*run `python scripts/index.py` again"):
        Index.open(str(tmp_path / "out"))


def test_shards_on_other_disks_are_compared_by_size(folder: Path, tmp_path: Path) -> None:
    elsewhere(folder, tmp_path / "out", str(folder))
    assert Index.open(str(tmp_path / "out")).counts == (4, 3, 2)
    (folder / "00000.tar").unlink()
    with (folder / "00002.tar").open("ab") as stream:
        stream.write(bytes(512))
    with pytest.raises(
        DataError, match=r"00000\.tar: missing.*; .*00002\.tar: 10752 bytes, but .* says 10240"
    ):
        Index.open(str(tmp_path / "out"))


def test_an_address_without_a_cache_or_an_index_says_what_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data.remote import AbsentError

    with pytest.raises(
        DataError,
        match=r"cache folder; run `python scripts/index.py 'https://example.org/\{0\.\.1\}.tar' OUT`",
    ):
        Index.open("https://example.org/{0..1}.tar")

    def absent(self: ShardCache, address: str, max_bytes: int) -> bytes:
        raise AbsentError("404")

    monkeypatch.setattr(ShardCache, "fetch_small", absent)
    with pytest.raises(
        DataError,
        match=r"https://example.org/0.tar: it has no index .* OUT` and set data.shards=OUT; .*org/1.tar",
    ):
        Index.open("https://example.org/{0..1}.tar", ShardCache(tmp_path, 1 << 30))


def test_indexes_beside_remote_shards_are_fetched(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(self: ShardCache, address: str, max_bytes: int) -> bytes:
        return (folder / address.rpartition("/")[2]).read_bytes()

    monkeypatch.setattr(ShardCache, "fetch_small", fetch)
    for _ in range(2):
        index = Index.open(
            "https://example.org/p/{00000..00002}.tar", ShardCache(tmp_path / "cache", 1 << 30)
        )
        assert index.fingerprint() == Index.open(str(folder)).fingerprint()
        assert index.headers[2].shard == "https://example.org/p/00002.tar"
        assert index.shard(2).key(1) == "00008"


def test_many_shards_join_in_the_order_of_their_names(tmp_path: Path) -> None:
    for number in range(70):
        write_shard(
            tmp_path / f"{number:03d}.tar", [(f"{number}-{i}", {"txt": b"x"}) for i in range(1 + number % 3)]
        )
    first = Index.open(str(tmp_path))
    assert [Path(header.shard).name for header in first.headers[:2]] == ["000.tar", "001.tar"]
    write_shard(tmp_path / "0355.tar", [("new", {"jpg": b"x"})])
    index = Index.open(str(tmp_path))
    names = [Path(header.shard).name for header in index.headers]
    assert names == sorted(names)
    assert index.headers[names.index("0355.tar")].fields == ("jpg",)
    assert index.shard(names.index("0355.tar")).key(0) == "new"
    assert len(index) == len(first) + 1
