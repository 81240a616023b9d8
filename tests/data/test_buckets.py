"""Shapes fit the pictures, every batch has one, and every picture of a bucket is used once an epoch."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data.buckets import BucketPlan, Buckets, Counted, bucket_shapes, merge, write_left_out
from data.cache import ShardCache
from data.index import Index, IndexView
from data.writer import write_shard

SIZES = [(40, 40)] * 7 + [(60, 40)] * 9 + [(40, 60)] * 6 + [(90, 40)] * 4


@pytest.fixture
def view(tmp_path: Path, make_image) -> IndexView:
    (tmp_path / "s").mkdir()
    for shard in range(3):
        samples = [
            (f"{shard}-{i}", {"jpg": make_image(i, size), "txt": b"a"})
            for i, size in enumerate(SIZES[shard:] + SIZES[:shard])
        ]
        write_shard(tmp_path / "s" / f"{shard}.tar", samples)
    cache = ShardCache(tmp_path / "cache", 1 << 30)
    return IndexView(Index.open(str(tmp_path / "s")), cache=cache)


@pytest.mark.parametrize(
    ("resolution", "divisor", "count", "aspect"), [(256, 16, 9, 2.0), (64, 8, 5, 3.0), (512, 64, 7, 2.0)]
)
def test_shapes_are_bounded(resolution: int, divisor: int, count: int, aspect: float) -> None:
    shapes = bucket_shapes(resolution, divisor, count, aspect)
    assert 3 <= len(shapes) <= count
    assert (resolution, resolution) in shapes
    assert list(shapes) == sorted(shapes, key=lambda s: s[0] / s[1])
    assert {(h, w) for w, h in shapes} == set(shapes)
    for width, height in shapes:
        assert width % divisor == height % divisor == 0
        assert 0.8 * resolution**2 <= width * height <= resolution**2
        assert max(width, height) <= aspect * min(width, height)
    assert bucket_shapes(resolution, divisor, 1, aspect) == ((resolution, resolution),)


def test_wrong_shapes_are_refused_with_what_would_do() -> None:
    with pytest.raises(ValueError, match=r"buckets=4; it must be odd.* 3 or 5"):
        bucket_shapes(64, 8, 4, 2.0)
    with pytest.raises(ValueError, match=r"max_aspect=0\.5"):
        bucket_shapes(64, 8, 3, 0.5)
    with pytest.raises(ValueError, match="resolution=60 is no multiple of 8"):
        bucket_shapes(60, 8, 3, 2.0)


def test_the_nearest_shape_is_chosen_and_the_rest_named() -> None:
    buckets = Buckets([(48, 80), (64, 64), (80, 48)], max_side_ratio=16.0)
    widths = np.array([10, 100, 300, 1000, 0, 1700, 129, 130], np.int32)
    heights = np.array([30, 100, 100, 1290, 50, 100, 100, 100], np.int32)
    # sqrt(80 / 48) = 1.29099 parts square and wide.
    assert buckets.assign(widths, heights).tolist() == [0, 1, 2, 1, -1, -2, 1, 2]
    small = Buckets([(64, 64)], max_upscale=2.0).assign(np.array([31, 31, 32]), np.array([31, 32, 32]))
    assert small.tolist() == [-3, 0, 0]


def test_small_buckets_join_the_nearest() -> None:
    shapes = [(40, 90), (48, 80), (64, 64), (80, 48), (90, 40)]
    assert merge([9, 9, 9, 9, 9], shapes, 4) == [0, 1, 2, 3, 4]
    assert merge([1, 9, 9, 9, 3], shapes, 4) == [1, 1, 2, 3, 3]
    assert merge([9, 1, 9, 0, 0], shapes, 4) == [0, 0, 2, 2, 2]
    assert merge([1, 1, 1, 1, 1], shapes, 100) in ([i] * 5 for i in range(5))


def test_a_bucket_is_gone_through_once_an_epoch_and_a_batch_has_one_shape(view: IndexView) -> None:
    counted = Counted(view, Buckets(bucket_shapes(64, 8, 5, 2.0)))
    for size in (4, 6):
        plan = BucketPlan([counted], [1.0], size, [3], 2)
        items = np.arange(size * 400)
        places = plan.places(items)
        by_shape: dict[int, list[str]] = {}
        for batch in range(400):
            inside = slice(batch * size, batch * size + size)
            [shape] = set(places.shapes[inside].tolist())
            for place in zip(*(column[inside].tolist() for column in places), strict=True):
                index, row = plan.sample([view], place)
                by_shape.setdefault(shape, []).append(index.key(row))
                wanted = counted.buckets.assign(*(np.array([v]) for v in index.image_size(row)))
                assert plan.number[wanted[0]] == shape
        assert sum(len(set(keys)) for keys in by_shape.values()) == len(view) == plan.samples
        for shape, keys in by_shape.items():
            epoch = plan.mixtures[shape].samples
            for start in range(0, len(keys) - epoch + 1, epoch):
                assert len(set(keys[start : start + epoch])) == epoch
            assert abs(len(keys) / (400 * size) - epoch / len(view)) < 0.01
        jumping = BucketPlan([counted], [1.0], size, [3], 2).places(items[-5:])
        assert all((a[-5:] == b).all() for a, b in zip(places, jumping, strict=True))
        shape = plan.substitute(9, 2**63 + 5).shapes
        assert shape == plan.interleave.choose(9 // size)[0]


def test_sources_share_a_bucket_by_weight(view: IndexView) -> None:
    counted = Counted(view, Buckets(bucket_shapes(64, 8, 3, 2.0)))
    plan = BucketPlan([counted, counted], [3.0, 1.0], 4, [3, 4], 2)
    places = plan.places(np.arange(4000))
    shares = np.bincount(places.sources) / 4000
    assert shares == pytest.approx([0.75, 0.25], abs=0.01)
    for shape in range(len(plan.shapes)):
        assert np.bincount(places.sources[places.shapes == shape])[0] == pytest.approx(
            0.75 * (places.shapes == shape).sum(), abs=4
        )


def test_what_is_left_out_is_named_and_the_pass_is_kept(tmp_path: Path, view: IndexView, monkeypatch) -> None:
    buckets = Buckets(bucket_shapes(64, 8, 3, 2.0), max_side_ratio=2.0)
    counted = Counted(view, buckets)
    assert counted.counts.sum() == len(view) - 12
    assert write_left_out(tmp_path / "left_out.jsonl", [counted]) == 12
    entries = [json.loads(line) for line in (tmp_path / "left_out.jsonl").read_text().splitlines()]
    assert Counter(entry["reason"] for entry in entries) == {"longer than max_aspect of the decoder": 12}
    assert {Path(entry["shard"]).name for entry in entries} == {"0.tar", "1.tar", "2.tar"}
    monkeypatch.setattr(Counted, "_count", lambda self: pytest.fail("counted again"))
    again = Counted(view, buckets)
    assert (again.counts == counted.counts).all()
    assert (again.left == counted.left).all()
    monkeypatch.undo()
    kept = counted._path()
    assert kept is not None
    data = bytearray(kept.read_bytes())
    data[-3] ^= 1
    kept.write_bytes(data)
    assert (Counted(view, buckets).counts == counted.counts).all()
