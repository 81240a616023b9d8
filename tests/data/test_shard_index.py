"""The index of one shard: what it records, what it refuses, and that its own damage is found."""

import io
import logging
import random
import subprocess
import sys
import tarfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from webdataset.writer import ShardWriter, TarWriter

from data.index import DataError, Index, build_index, index_path, key_hash, read_index, write_index
from data.shard_index import current_index, split_name, string_hash
from data.tar import TarError
from data.writer import write_shard

PROJECT = Path(__file__).resolve().parents[2]


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
        assert '"index_version": 2' in file.metadata()["index"]


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
    assert split_name("x/a.Moments.NPY") == ("x/a", "moments.npy")
    assert split_name("a.npy") == ("a", "npy")
    with pytest.raises(TarError, match=r"dotted key: key 'a' with field 'b.c.npy'"):
        split_name("a.b.c.npy")
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
    monkeypatch.setattr("data.shard_index.INDEX_VERSION", 3)
    with pytest.raises(DataError, match="index_version 2, this program reads 3"):
        read_index(shard)


def test_a_workers_error_keeps_its_one_line() -> None:
    text = "Caught DataError in DataLoader worker process 0.\nTraceback\n  x\ndata.index.DataError: a: b; c\n"
    assert str(DataError(text)) == "a: b; c"
    assert str(DataError("plain")) == "plain"


def test_json_and_captions_become_columns(tmp_path: Path) -> None:
    records = [
        b'{"score": 5, "ok": true, "name": "x", "deep": {"a": 1}, "list": [1], "none": null, "big": 1e999}',
        b'{"score": "high", "name": "y", "long": "%s"}' % (b"z" * 129),
        b"{broken", b'{"a": 1, "a": 2}', b"[1]", b'{"huge": 1%s, "name": "x"}' % (b"0" * 400),
    ]  # fmt: skip
    texts = [b"two words", b"", "\ufeff a\u00a0b \n c".encode(), b"\xff\xfe", b"x" * 20_000, None]
    samples = [
        (f"{i}", {"json": r, **({"txt": t} if t is not None else {})})
        for i, (r, t) in enumerate(zip(records, texts, strict=True))
    ]
    write_shard(tmp_path / "a.tar", samples)
    index = read_index(tmp_path / "a.tar")
    assert index.number_names == ("ok", "score")
    assert index.string_names == ("name", "score")
    numbers, strings = index.arrays["numbers"], index.arrays["strings"]
    assert numbers[0].tolist() == [1.0, 5.0]
    assert np.isnan(numbers[1:]).all()
    assert strings[0, 0] == strings[5, 0] == string_hash("x")
    assert strings[1].tolist() == [string_hash("y"), string_hash("high")]
    assert not strings[2:5].any()
    assert index.arrays["words"].tolist() == [2, 0, 3, 65535, 65535, 65535]
    assert (index.arrays["captions"] != 0).tolist() == [True, False, True, False, False, False]
    assert index.notes == {"ignored": 0, "bad_json": 3, "bad_captions": 2, "bad_images": 0}


def test_columns_are_bounded_and_the_most_common_ones_stay(tmp_path: Path) -> None:
    common = b'"score": 1, "other": 2'
    samples = [(f"{i}", {"json": b'{%s, "own%d": 1, "s%d": "x"}' % (common, i, i)}) for i in range(300)]
    index = write_shard(tmp_path / "a.tar", samples)
    assert len(index.number_names) == len(index.string_names) == 128
    assert {"score", "other"} <= set(index.number_names)


def test_perceptual_hashes_are_made_where_asked_for(make_shard, make_image) -> None:
    shard = make_shard(count=3)
    assert "phashes" not in build_index(shard).arrays
    seen = []
    built = build_index(shard, image_hash=lambda data: seen.append(data) or len(seen))
    assert seen == [make_image(i) for i in range(3)]
    assert built.arrays["phashes"].tolist() == [1, 2, 3]
    write_index(built)
    assert read_index(shard).arrays["phashes"].tolist() == [1, 2, 3]


def test_img2dataset_folders_and_shard_writers_are_read(tmp_path: Path, make_image) -> None:
    for number in range(2):
        with tarfile.open(tmp_path / f"0000{number}.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            for i in range(3):
                key = f"0000{number}000{i}"
                record = (
                    b'{"url": "u", "key": "%s", "status": "success", "width": 24, "exif": "{}"}'
                    % key.encode()
                )
                for field, data in (("jpg", make_image(i)), ("json", record), ("txt", b"a flower")):
                    info = tarfile.TarInfo(f"{key}.{field}")
                    info.size, info.mtime = len(data), 1700000000.25
                    tar.addfile(info, io.BytesIO(data))
        (tmp_path / f"0000{number}_stats.json").write_text("{}")
        (tmp_path / f"0000{number}.parquet").write_bytes(b"PAR1")
    index = Index.open(str(tmp_path))
    assert (index.counts, index.shard(1).fields) == ((3, 3), ("jpg", "json", "txt"))
    assert index.shard(0).number_names == ("width",)
    with ShardWriter(str(tmp_path / "w-%02d.tar"), maxcount=2, verbose=0) as writer:
        for i in range(3):
            writer.write({"__key__": f"folder/{i}", "__url__": "x", "jpg": make_image(i), "cls": b"1"})
    assert Index.open(str(tmp_path / "w-*.tar")).counts == (2, 1)
    assert read_index(tmp_path / "w-00.tar").key(1) == "folder/1"


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_folders_are_read(tmp_path: Path, make_image, form: int) -> None:
    (tmp_path / "photos" / ("deep" * 40)).mkdir(parents=True)
    for name in ("photos/a.jpg", f"photos/{'deep' * 40}/b.jpg"):
        (tmp_path / name).write_bytes(make_image())
    with tarfile.open(tmp_path / "0.tar", "w", format=form) as tar:
        tar.add(tmp_path / "photos", "photos")
    index = build_index(tmp_path / "0.tar")
    assert sorted(index.key(row) for row in range(2)) == ["photos/a", f"photos/{'deep' * 40}/b"]


def test_every_cut_and_header_flip_of_a_shard_is_found_at_build(make_shard) -> None:
    shard = make_shard(count=2)
    data, whole = shard.read_bytes(), build_index(shard)
    end = max(whole.extent(row, name).offset for row in range(2) for name in whole.fields)
    silent, refusals = 0, []
    for cut in range(0, len(data), 512):
        shard.write_bytes(data[:cut])
        try:
            cut_index = build_index(shard)
        except DataError as error:
            refusals.append(str(error))
            continue
        assert cut > end + 512  # only zeros after the end mark are gone: no field is
        assert np.array_equal(cut_index.arrays["offsets"], whole.arrays["offsets"])
        assert cut_index.sha256 != whole.sha256
        silent += 1
    assert silent < 20
    assert all("00000.tar: " in refusal and "\n" not in refusal for refusal in refusals)
    for bit in range(0, 512 * 8, 7):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        shard.write_bytes(damaged)
        with suppress(DataError):
            assert build_index(shard).sha256 != whole.sha256


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused_and_names_never_leave_the_tar(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        info = tarfile.TarInfo("../../etc/a.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(
        DataError, match=r"0\.tar: the member at byte 0 is a (symbolic link|hard link|device|pipe)"
    ):
        build_index(tmp_path / "0.tar")
    assert [path.name for path in tmp_path.iterdir()] == ["0.tar"]


def test_indexing_starts_without_torch() -> None:
    script = "import sys, data.index, data.indexing, data.index_report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=PROJECT, check=False).returncode == 0


def test_old_indexes_are_made_again_where_asked_for(make_shard, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = make_shard()
    monkeypatch.setattr("data.shard_index.INDEX_VERSION", 1)
    write_index(build_index(shard))
    monkeypatch.undo()
    assert current_index(shard).count == read_index(shard).count == 5
    index_path(shard).unlink()
    assert current_index(shard).count == 5
    index_path(shard).write_bytes(b"damaged")
    with pytest.raises(DataError, match="delete it and it is made again"):
        current_index(shard)
