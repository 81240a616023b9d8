"""Samples are exact functions of (seed, index); bad ones are replaced, written down and capped."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data.index import DataError, Index, IndexView, build_index, index_path, write_index
from data.order import Order
from data.reader import FieldReader
from data.shards import MissingCaption, ShardDataset
from data.transforms import Decoder, ResizeCrop
from data.writer import write_shard


def dataset(
    shards: Path | str, seed: int = 0, crop: ResizeCrop | None = None, **options: object
) -> ShardDataset:
    view = IndexView(Index.open(str(shards)))
    return ShardDataset(view, Order(view.counts, seed), Decoder(), crop or ResizeCrop(8), seed, **options)


def rewrite(shard: Path, key: str, field: str, data: bytes | None) -> None:
    """Replaces or removes one field of a shard of the maker."""
    index, old = build_index(shard), shard.read_bytes()
    samples = []
    for row in range(index.count):
        fields = {}
        for name in index.fields:
            offset, size, _ = index.extent(row, name)
            fields[name] = old[offset : offset + size]
        if index.key(row) == key:
            fields.pop(field)
            if data is not None:
                fields[field] = data
        samples.append((index.key(row), fields))
    write_shard(shard, samples)


def flip(shard: Path, key: str, field: str) -> None:
    """Flips a bit of one field, behind the index's back."""
    index, data = build_index(shard), bytearray(shard.read_bytes())
    row = next(row for row in range(index.count) if index.key(row) == key)
    data[index.extent(row, field).offset + 3] ^= 1
    shard.write_bytes(data)


def test_an_epoch_holds_every_sample_once_with_its_own_caption(make_shard) -> None:
    make_shard("s/00000.tar", 7)
    shards = make_shard("s/00001.tar", 5, first=7).parent
    data = dataset(shards)
    assert len(data) == 12
    for epoch in (0, 3):
        samples = [data[epoch * 12 + i] for i in range(12)]
        assert sorted(sample.key for sample in samples) == [f"{i:05d}" for i in range(12)]
        for sample in samples:
            assert sample.caption == f"picture {int(sample.key)}"
            assert sample.pixels[2].float().mean() == pytest.approx(int(sample.key) * 37 % 256, abs=4)
            assert (sample.pixels.shape, sample.record) == ((3, 8, 8), {"label": "x"})
            assert not sample.substituted


def test_a_worker_keeps_nothing_of_what_it_gave(make_shard, monkeypatch: pytest.MonkeyPatch) -> None:
    data = dataset(make_shard(count=9))
    expected = [data[i].pixels for i in range(8)]
    monkeypatch.setattr("data.handover.get_worker_info", lambda: "a worker")
    one, two = data.__getitems__([0, 1, 2, 3]), data.__getitems__([4, 5, 6, 7])
    for given, first in ((one, 0), (two, 4)):
        assert given.pixels.is_shared()
        assert torch.equal(given.pixels, torch.stack(expected[first : first + 4]))
        assert all(torch.equal(a.pixels, b) for a, b in zip(given, expected[first:], strict=False))


def test_a_large_field_is_read_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"jpg": bytes(range(256)) * 200, "json": b"{}", "txt": b"words"}
    index = write_shard(tmp_path / "a.tar", [("a", fields), ("b", {**fields, "jpg": b"small"})])
    real, sizes = os.pread, []

    def counted(handle: int, size: int, offset: int) -> bytes:
        sizes.append(size)
        return real(handle, size, offset)

    monkeypatch.setattr("os.pread", counted)
    reader, names = FieldReader(), frozenset(fields)
    found = reader.read(index, 0, names)
    assert {name: found.take(name) for name in names} == fields
    assert sizes[0] == 51_200
    assert len(sizes) == 2
    found = reader.read(index, 1, names)
    assert {name: found.take(name) for name in names} == {**fields, "jpg": b"small"}
    assert len(sizes) == 3


def test_a_sample_is_a_function_of_seed_and_index(make_shard) -> None:
    crop = ResizeCrop(8, random_crop=True, flip=True)
    shard = make_shard(count=9)
    one, two, other = (dataset(shard, seed, crop) for seed in (5, 5, 6))
    backwards = {i: two[i] for i in reversed(range(40))}
    for i in range(40):
        first, second = one[i], backwards[i]
        assert (first.index, first.key, first.caption) == (second.index, second.key, second.caption)
        assert torch.equal(first.pixels, second.pixels)
    assert [one[i].key for i in range(9)] != [other[i].key for i in range(9)]
    by_key: dict[str, list[torch.Tensor]] = {}
    for i in range(90):
        by_key.setdefault(one[i].key, []).append(one[i].pixels)
    assert all(any(not torch.equal(p, pixels[0]) for p in pixels) for pixels in by_key.values())


@pytest.mark.parametrize(
    ("field", "content", "message"),
    [
        ("jpg", b"", "empty file"),
        ("jpg", b"<html>", "not an image (text/html)"),
        ("jpg", None, "no image field"),
        ("txt", b"\xff\xfe", "UTF-16"),
        ("json", b"{", "bad JSON"),
    ],
)
def test_a_bad_sample_is_replaced_and_written_down(
    make_shard, tmp_path: Path, field: str, content: bytes | None, message: str
) -> None:
    shard = make_shard(count=8)
    rewrite(shard, "00003", field, content)
    runs = []
    for run in range(2):
        path = tmp_path / f"{run}" / "bad_samples.jsonl"
        data = dataset(shard, bad_samples=path, max_bad_fraction=0.1)
        runs.append([data[i].key for i in range(24)])
        lines = path.read_text().splitlines()
        assert len(lines) == 1
        entry = json.loads(lines[0])
        assert (entry["shard"], entry["key"], entry["field"]) == (str(shard), "00003", field)
        assert message in entry["reason"]
        assert sum(data[i].substituted for i in range(24)) == 3
    assert runs[0] == runs[1]
    assert "00003" not in runs[0]


def test_a_flipped_payload_is_found_by_its_checksum(make_shard, tmp_path: Path) -> None:
    for field in ("jpg", "txt", "json"):
        shard = make_shard(f"{field}/00000.tar", 8)
        flip(shard, "00005", field)
        bad = tmp_path / field / "bad.jsonl"
        keys = {dataset(shard, bad_samples=bad, max_bad_fraction=0.2)[i].key for i in range(8)}
        assert "00005" not in keys
        assert json.loads(bad.read_text().splitlines()[0])["reason"].startswith("crc32c is ")


def test_the_file_of_bad_samples_holds_no_control_characters(make_shard, tmp_path: Path) -> None:
    shard = make_shard(count=3)
    rewrite(shard, "00001", "jpg", b"\x1b[31m\n\n" + b"x" * 9)
    data = dataset(shard, bad_samples=tmp_path / "bad.jsonl", max_bad_fraction=0.5)
    [data[i] for i in range(3)]
    text = (tmp_path / "bad.jsonl").read_bytes()
    assert text.count(b"\n") == 1
    assert b"\x1b" not in text


def test_too_many_bad_samples_stop_the_run(make_shard) -> None:
    shard = make_shard(count=10)
    for key in ("00002", "00004"):
        flip(shard, key, "jpg")
    data = dataset(shard, max_bad_fraction=0.01)  # one of ten
    message = r"2 bad samples, 1 of 10 allowed, .*00000\.tar key .* data.max_bad_fraction"
    with pytest.raises(DataError, match=message):
        [data[i] for i in range(10)]
    flip(shard, "00004", "jpg")
    with pytest.raises(DataError, match="1 bad samples, 0 of 10 allowed"):
        [dataset(shard, max_bad_fraction=0.0)[i] for i in range(10)]


def test_missing_captions_follow_the_policy(make_shard, tmp_path: Path) -> None:
    shard = make_shard(count=6)
    rewrite(shard, "00001", "txt", None)
    shard_blank = make_shard("blank/00000.tar", count=6)
    rewrite(shard_blank, "00001", "txt", b" \n\t")
    for path in (shard, shard_blank):
        skipping = dataset(path, bad_samples=tmp_path / "bad.jsonl", max_bad_fraction=0.0)
        assert "00001" not in {skipping[i].key for i in range(6)}
        assert not (tmp_path / "bad.jsonl").exists()
        keeping = dataset(path, missing_caption=MissingCaption.UNCONDITIONAL)
        captions = {keeping[i].key: keeping[i].caption for i in range(6)}
        assert captions["00001"] == ""
        assert captions["00002"] == "picture 2"


def test_no_captions_at_all_is_an_error_with_the_remedy(tmp_path: Path, make_image) -> None:
    write_shard(tmp_path / "a.tar", [(str(i), {"jpg": make_image(i)}) for i in range(3)])
    message = r"100 unusable samples in a row, .* data.missing_caption=UNCONDITIONAL"
    with pytest.raises(DataError, match=message):
        dataset(tmp_path / "a.tar")[0]


def test_read_errors_are_tried_again_then_fail(make_shard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.reader.FIRST_WAIT", 0.0)
    data, real, failures = dataset(make_shard()), os.pread, [3]

    def failing(handle: int, size: int, offset: int) -> bytes:
        if failures[0]:
            failures[0] -= 1
            raise OSError(5, "Input/output error")
        return real(handle, size, offset)

    expected = data[0]
    monkeypatch.setattr("os.pread", failing)
    assert torch.equal(data[0].pixels, expected.pixels)
    failures[0] = 99
    message = r"00000\.tar key .* field jpg: read failed 4 times \(Input/output error\)"
    with pytest.raises(DataError, match=message):
        data[0]


def test_a_shard_cut_while_in_use_is_an_error(make_shard) -> None:
    shard = make_shard()
    data = dataset(shard)
    os.truncate(shard, 600)
    with pytest.raises(DataError, match="the shard was cut while in use"):
        [data[i] for i in range(5)]


def test_a_stale_index_pairs_nothing_wrongly(make_shard) -> None:
    """A shard replaced by another one of the same size must give no sample, not another one's caption."""
    one, two = make_shard("one/00000.tar", 5), make_shard("two/00000.tar", 5, first=5)
    assert one.stat().st_size == two.stat().st_size
    one.write_bytes(two.read_bytes())
    with pytest.raises(DataError, match="crc32c"):
        [dataset(one)[i] for i in range(5)]


def test_descriptors_are_few_and_not_shared_between_processes(make_shard, monkeypatch) -> None:
    for i in range(5):
        make_shard(f"s/{i:05d}.tar", 2, first=2 * i)
    monkeypatch.setattr("data.reader.MAX_OPEN_FILES", 2)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    data = dataset(make_shard("s/00009.tar", 2, first=90).parent)
    [data[i] for i in range(24)]
    if before:
        assert len(os.listdir("/proc/self/fd")) - before <= 2
    copy = pickle.loads(pickle.dumps(data))
    assert not copy.reader.handles
    assert torch.equal(copy[3].pixels, data[3].pixels)
    handles = dict(data.reader.handles)
    monkeypatch.setattr("os.getpid", lambda: -5)
    data[3]
    assert len(data.reader.handles) == 1
    for handle, _ in handles.values():
        os.close(handle)


def test_a_dataset_pickles_small(make_shard) -> None:
    data = dataset(make_shard(count=200))
    [data[i] for i in range(50)]
    assert len(pickle.dumps(data)) < 4000


def test_other_field_types_are_never_opened(tmp_path: Path, make_image) -> None:
    """S4: a pickle beside a picture is data nobody reads."""

    class Payload:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return os.mkdir, (str(tmp_path / "marker"),)

    evil = pickle.dumps(Payload())
    fields = {"jpg": make_image(), "txt": b"a", "pyd": evil, "pkl": evil, "pth": evil}
    write_shard(tmp_path / "a.tar", [("a", fields)])
    assert dataset(tmp_path / "a.tar")[0].caption == "a"
    assert not (tmp_path / "marker").exists()


def test_wrong_arguments_are_refused(make_shard) -> None:
    view = IndexView(Index.open(str(make_shard())))
    with pytest.raises(ValueError, match="order is over other shards"):
        ShardDataset(view, Order((4,), 0), Decoder(), ResizeCrop(8), 0)
    with pytest.raises(ValueError, match="max_bad_fraction=2"):
        ShardDataset(view, Order((5,), 0), Decoder(), ResizeCrop(8), 0, max_bad_fraction=2)


def test_the_fingerprint_follows_the_shards(make_shard) -> None:
    shard = make_shard()
    first = dataset(shard).fingerprint()
    assert dataset(shard, seed=9).fingerprint() == first
    flip(shard, "00000", "jpg")
    index_path(shard).unlink()
    write_index(build_index(shard))
    assert dataset(shard).fingerprint() != first
