"""The index of one shard: what it records, what it refuses, and that its own damage is found."""

import io
import logging
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from webdataset.writer import TarWriter

from data.index import DataError, build_index, index_path, key_hash, read_index, write_index
from data.shard_index import split_name
from data.tar import TarError


def tar_of(path: Path, names: list[str], data: bytes = b"x") -> Path:
    with tarfile.open(path, "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_fields_lie_where_the_index_says(make_shard, make_image) -> None:
    shard = make_shard(count=7)
    index, data = build_index(shard), shard.read_bytes()
    assert (index.count, index.fields, index.size) == (7, ("jpg", "json", "txt"), len(data))
    for row in range(7):
        offset, size, _ = index.extent(row, "jpg")
        assert data[offset : offset + size] == make_image(row)
        assert index.key(row) == f"{row:05d}"
        assert index.image_field(row) == "jpg"
        assert index.image_size(row) == (24, 16)
    assert index.extent(0, "png") is None
    assert int(index.key_hashes[3]) == key_hash("00003")


def test_image_sizes_are_upright(tmp_path: Path, make_image) -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (
            ("a.jpg", make_image(exif=exif)),
            ("b.png", make_image(form="PNG")),
            ("c.jpg", b"?"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    index = build_index(tmp_path / "a.tar")
    assert [index.image_size(row) for row in range(3)] == [(16, 24), (24, 16), (0, 0)]


def test_round_trip_is_exact_and_its_bytes_are_the_same(make_shard) -> None:
    shard = make_shard()
    first, written = read_index(shard, verify=True), index_path(shard).read_bytes()
    built = build_index(shard)
    assert first.header == built.header
    for name, array in built.arrays.items():
        assert np.array_equal(array, first.arrays[name])
    write_index(built)
    assert index_path(shard).read_bytes() == written
    assert sorted(path.name for path in shard.parent.iterdir()) == ["00000.tar", "00000.tar.idx"]


def test_an_index_is_a_safetensors_file(make_shard) -> None:
    with safe_open(index_path(make_shard()), "np") as file:
        assert file.get_tensor("offsets").shape == (5, 3)
        assert '"index_version": 1' in file.metadata()["index"]


@pytest.mark.parametrize(
    ("names", "message"),
    [(["a.jpg", "a.jpg"], "key 'a' occurs twice, at bytes 512 and 1536 .field 'jpg'"),
     (["a.jpg", "b.jpg", "a.txt"], "key 'a' occurs twice.*side by side"),
     (["a.v1.jpg"], "member 'a.v1.jpg' has a dotted key"),
     (["README"], "no samples"), ([], "no samples"),
     ([f"a.f{i}" for i in range(65)], "more than 64 different fields")],
)  # fmt: skip
def test_bad_shards_are_refused_by_name(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        build_index(tar_of(tmp_path / "bad.tar", names))
    assert "bad.tar" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_ignored_members_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        index = build_index(tar_of(tmp_path / "a.tar", ["._a.jpg", "a.jpg", "a.txt", "b.jpg", "NOTES"]))
    assert "1 of 2 samples lack txt (first: 'b')" in caplog.text
    assert "2 members without a field" in caplog.text
    assert index.extent(1, "txt") is None


def test_shards_of_webdatasets_writer_are_read(tmp_path: Path, make_image) -> None:
    with (tmp_path / "a.tar").open("wb") as stream, TarWriter(stream, encoder=False) as writer:
        for i in range(3):
            writer.write({"__key__": f"{i:09d}", "jpg": make_image(i), "txt": b"a", "json": b"{}"})
    index = build_index(tmp_path / "a.tar")
    assert (index.count, index.fields, index.key(2)) == (3, ("jpg", "json", "txt"), "000000002")


def test_names_are_split_as_webdataset_does() -> None:
    assert split_name("x.y/a.JPG") == ("x.y/a", "jpg")
    assert split_name("../../etc/a.jpg") == ("../../etc/a", "jpg")
    assert split_name("a") is None
    with pytest.raises(TarError, match="dotted"):
        split_name("a.b.c")


def test_a_cut_shard_is_found_by_its_size(make_shard) -> None:
    shard = make_shard()
    data = shard.read_bytes()
    for cut in range(0, len(data), 512):
        shard.write_bytes(data[:cut])
        with pytest.raises(DataError, match=rf"00000.tar: {cut} bytes, but its index says {len(data)}"):
            read_index(shard)


def test_a_flipped_shard_is_found_on_request(make_shard) -> None:
    shard = make_shard()
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    read_index(shard)
    with pytest.raises(DataError, match=r"SHA-256 is .*, its index says"):
        read_index(shard, verify=True)


def test_every_flip_and_cut_of_an_index_is_found(make_shard) -> None:
    shard = make_shard(count=3)
    path = index_path(shard)
    data, header, arrays = path.read_bytes(), read_index(shard).header, build_index(shard).arrays
    draw, refusals = random.Random(0), []
    for bit in draw.sample(range(len(data) * 8), 600):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            index = read_index(shard)
        except DataError as error:
            refusals.append(str(error))
            continue
        assert index.header == header
        assert all(np.array_equal(index.arrays[name], arrays[name]) for name in arrays)
    assert len(refusals) > 500
    assert all("00000.tar" in refusal for refusal in refusals)
    for cut in range(0, len(data), 61):
        path.write_bytes(data[:cut])
        with pytest.raises(DataError, match=r"00000\.tar\.idx: .*delete it and it is made again"):
            read_index(shard)


def test_missing_files_are_named(make_shard) -> None:
    shard = make_shard()
    index_path(shard).unlink()
    with pytest.raises(DataError, match=r"00000\.tar\.idx: missing"):
        read_index(shard)
    shard.unlink()
    with pytest.raises(DataError, match=r"00000\.tar: missing"):
        read_index(shard)


def test_another_version_is_refused(make_shard, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = make_shard()
    monkeypatch.setattr("data.shard_index.INDEX_VERSION", 2)
    with pytest.raises(DataError, match="index_version 1, this program reads 2"):
        read_index(shard)


def test_a_workers_error_keeps_its_one_line() -> None:
    text = "Caught DataError in DataLoader worker process 0.\nTraceback\n  x\ndata.index.DataError: a: b; c\n"
    assert str(DataError(text)) == "a: b; c"
    assert str(DataError("plain")) == "plain"
