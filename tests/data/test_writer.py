"""Shards are written with the same bytes every time, whole or not at all, and others can read them."""

import os
from pathlib import Path

import pytest
from webdataset.tariterators import group_by_keys, tar_file_iterator

from data.index import DataError, Index, index_path, read_index
from data.writer import write_shard

SAMPLES = [("a", {"txt": b"one", "jpg": b"\xff" * 600}), ("ü/" + "b" * 150, {"jpg": b""})]


def test_same_samples_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = write_shard(tmp_path / "one.tar", SAMPLES)
    monkeypatch.setattr("time.time", lambda: 1.0)
    two = write_shard(
        tmp_path / "two.tar", ((key, dict(reversed(fields.items()))) for key, fields in SAMPLES)
    )
    assert one.sha256 == two.sha256
    assert (tmp_path / "one.tar.idx").read_bytes() == (tmp_path / "two.tar.idx").read_bytes()
    assert one.sha256 == "9302b47fb9b688d11d82b4954e09d4999a82551ef2c49fcbde8eb124536cb200"


def test_webdataset_reads_what_is_written(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", SAMPLES)
    with (tmp_path / "a.tar").open("rb") as stream:
        read = list(group_by_keys({**file, "__url__": "a"} for file in tar_file_iterator(stream)))
    assert [(s["__key__"], s["jpg"]) for s in read] == [(key, fields["jpg"]) for key, fields in SAMPLES]


@pytest.mark.parametrize("key", ["", "a.b", "/a", "a/", "a\n", ".", "a\x1b[0m"])
def test_keys_that_would_be_misread_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(DataError, match="key"):
        write_shard(tmp_path / "a.tar", [(key, {"jpg": b"x"})])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("samples", "message"),
    [([], "no samples"), ([("a", {})], "no fields"), ([("a", {"J.PG": b""})], "field 'J.PG'"),
     ([("a", {"jpg": b""}), ("a", {"jpg": b""})], "occurs twice")],
)  # fmt: skip
def test_bad_samples_are_refused(tmp_path: Path, samples: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        write_shard(tmp_path / "a.tar", samples)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_old_shard(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    old = write_shard(path, SAMPLES).sha256

    def failing():
        yield SAMPLES[0]
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_shard(path, failing())
    assert read_index(path, verify=True).sha256 == old
    assert len(list(tmp_path.iterdir())) == 2


def test_a_crash_between_shard_and_index_is_recovered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.tar"
    write_shard(path, SAMPLES[:1])
    real = os.replace

    def crash_after_shard(source: Path, target: Path) -> None:
        real(source, target)
        if Path(target) == path:
            raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", crash_after_shard)
    with pytest.raises(KeyboardInterrupt):
        write_shard(path, SAMPLES)
    monkeypatch.undo()
    assert not index_path(path).exists()
    assert len(Index.open(str(path))) == 2
    assert read_index(path, verify=True).count == 2
