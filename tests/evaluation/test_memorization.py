"""Copies of training pictures: planted ones are found with shard and key, pictures of their own are not."""

import io
import itertools
import json
import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data.index import DataError, Index, IndexView, open_split
from data.landscapes import Scene, Terrain, Time, draw_scene, encode, render
from data.writer import write_shard
from evaluation.features import PortionedFeatures
from evaluation.memorization import (
    Calibration,
    Memorization,
    calibrate,
    copies_sheet,
    find_copies,
    threshold_of,
)
from evaluation.picture_index import PictureIndex, thumbnails

SIZE, TRAIN, HELD_OUT, OWN = 64, 240, 120, 40


def see(pictures: Tensor) -> Tensor:
    """Features float32 `[N 64]`: the colours of 4 x 4 areas, mixed by fixed weights."""
    mix = torch.from_numpy(np.random.default_rng(3).standard_normal((48, 64)).astype(np.float32))
    return F.adaptive_avg_pool2d(pictures.float() / 127.5 - 1, 4).flatten(1) @ mix


def network(sha256: str = "0" * 64, function: Callable[[Tensor], Tensor] = see) -> PortionedFeatures:
    return PortionedFeatures("areas", sha256, 64, "to 4 x 4 by area", 16, function)


@cache
def scene(seed: int, number: int) -> Scene:
    """Scene `number` of mountains at noon: of all kinds there would be few that look alike among hundreds."""
    start = scene(seed, number - 1).index + 1 if number else 0
    drawn = (draw_scene(seed, index) for index in itertools.count(start))
    return next(each for each in drawn if each.time is Time.NOON and each.terrain is Terrain.MOUNTAINS)


def scenes(seed: int, numbers: Sequence[int]) -> Tensor:
    pixels = np.stack([render(scene(seed, number), SIZE) for number in numbers])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def jpeg(picture: Tensor, quality: int) -> Tensor:
    buffer = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1)


def moved(picture: Tensor, right: int, down: int) -> Tensor:
    padded = F.pad(picture[None].float(), (4, 4, 4, 4), "replicate")[0]
    return padded[:, 4 - down : 4 - down + SIZE, 4 - right : 4 - right + SIZE].to(torch.uint8)


def blurred(picture: Tensor) -> Tensor:
    """As an autoencoder of few latents blurs."""
    small = F.avg_pool2d(picture[None].float(), 4)
    return F.interpolate(small, scale_factor=4, mode="bilinear")[0].round().to(torch.uint8)


def tinted(picture: Tensor) -> Tensor:
    tint = torch.tensor([8.0, -4.0, -8.0])[:, None, None]
    return (0.95 * picture.float() + tint).clamp(0, 255).to(torch.uint8)


DISTURBED: dict[str, Callable[[Tensor], Tensor]] = {
    "same": lambda x: x,
    "jpeg": lambda x: jpeg(x, 40),
    "moved by one": lambda x: moved(x, 1, -1),
    "moved by two": lambda x: moved(x, -2, 2),
    "tinted": tinted,
    "blurred": blurred,
    "mirrored": lambda x: x.flip(-1),
    "moved, tinted and jpeg": lambda x: jpeg(tinted(moved(x, 1, 1)), 60),
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for number in range(4):
        part = range(number * TRAIN // 4, (number + 1) * TRAIN // 4)
        write_shard(folder / f"{number:05d}.tar", (encode(scene(1, each), SIZE) for each in part))
    return folder


@pytest.fixture(scope="module")
def view(shards: Path) -> IndexView:
    return IndexView(Index.open(str(shards)))


@pytest.fixture(scope="module")
def index(view: IndexView, tmp_path_factory: pytest.TempPathFactory) -> PictureIndex:
    return PictureIndex.build([view], network(), tmp_path_factory.mktemp("index"), SIZE, shown=False)


@pytest.fixture(scope="module")
def calibration(index: PictureIndex) -> Calibration:
    return calibrate(scenes(2, range(HELD_OUT)), network(), index)


@pytest.fixture(scope="module")
def made() -> Tensor:
    """8 disturbed copies of training pictures 11, 39, ..., and 40 pictures of their own."""
    real = scenes(1, range(11, TRAIN, 28)[:8])
    copies = torch.stack([change(each) for change, each in zip(DISTURBED.values(), real, strict=True)])
    return torch.cat([copies, scenes(5, range(OWN))])


@pytest.fixture(scope="module")
def found(made: Tensor, index: PictureIndex, calibration: Calibration) -> Memorization:
    return find_copies(made, network(), index, calibration)


def test_near_copies_are_found_with_shard_and_key(found: Memorization) -> None:
    assert {match.picture for match in found.copies} == set(range(8))
    for match in found.copies:
        number = 11 + 28 * match.picture
        assert match.by_pixels.place.key == f"landscape-{scene(1, number).index:08d}"
        assert match.by_pixels.place.shard.endswith(f"{number // (TRAIN // 4):05d}.tar")
        assert match.by_pixels.number == number


def test_pictures_of_their_own_raise_no_alarm(found: Memorization, calibration: Calibration) -> None:
    own = [match for match in found.matches if match.picture >= 8]
    assert len(own) == OWN
    threshold = calibration.threshold
    assert min(match.gap for match in own) > threshold.gap
    assert threshold.held_out == HELD_OUT
    assert 0.3 < threshold.gap < threshold.lowest < 1


def test_the_worst_is_first_and_an_exact_copy_has_no_gap(found: Memorization) -> None:
    gaps = [match.gap for match in found.matches]
    assert gaps == sorted(gaps)
    exact = next(match for match in found.matches if match.picture == 0)
    assert exact.gap < 0.1  # the shard holds a JPEG
    assert exact.by_features.number == exact.by_pixels.number
    assert found.summary()["copies"] == 8
    assert found.summary()["smallest_gap"] == gaps[0]
    assert json.loads(json.dumps(found.to_dict()))["matches"][0]["by_pixels"]["place"]["key"]


def test_any_order_of_pictures_gives_the_same_numbers(
    found: Memorization, made: Tensor, index: PictureIndex, calibration: Calibration
) -> None:
    numbers = [19, 3, 47]
    again = find_copies(made[numbers], network(), index, calibration)
    before = {match.picture: match for match in found.matches}
    for match in again.matches:
        same = before[numbers[match.picture]]
        assert (match.gap, match.by_pixels, match.by_features) == (same.gap, same.by_pixels, same.by_features)


def test_copies_are_shown_beside_what_they_copy(
    found: Memorization, made: Tensor, index: PictureIndex
) -> None:
    sheet = copies_sheet(found, made, index, shown=3)
    assert sheet is not None
    assert sheet.width > 6 * SIZE * 2
    assert copies_sheet(Memorization((), found.threshold), made, index) is None
    read, rendered = index.picture(65).float(), scenes(1, [65])[0].float()
    assert (read - rendered).abs().mean() < 4  # a JPEG of it


def test_a_picture_that_is_in_the_data_twice_can_be_copied_too(
    tmp_path: Path, calibration: Calibration
) -> None:
    """The nearest other training picture of a duplicate is the duplicate: it must not hide the copy."""
    samples = [encode(scene(1, number), SIZE) for number in range(60)]
    write_shard(tmp_path / "0.tar", [*samples, ("again", {**samples[20][1], "txt": b"another caption"})])
    doubled = PictureIndex.build(
        [IndexView(Index.open(str(tmp_path)))], network(), tmp_path / "index", SIZE, shown=False
    )
    (match,) = find_copies(blurred(scenes(1, [20])[0])[None], network(), doubled, calibration).matches
    assert match.copied
    assert match.by_pixels.place.key in (samples[20][0], "again")


def test_copies_of_all_there_is_to_copy_are_found(tmp_path: Path) -> None:
    """Eight training pictures, far from one another: only held-out ones show how near pictures can be."""
    write_shard(tmp_path / "0.tar", [encode(scene(1, number), SIZE) for number in range(8)])
    eight = build(IndexView(Index.open(str(tmp_path))), tmp_path / "index", Counting())
    calibration = calibrate(scenes(2, range(80)), network(), eight)
    copies = torch.stack([blurred(each) for each in scenes(1, range(8))])
    found = find_copies(torch.cat([copies, scenes(5, range(24))]), network(), eight, calibration)
    assert {match.picture for match in found.copies} == set(range(8))
    assert {match.by_pixels.number for match in found.copies} == set(range(8))


def test_the_threshold_is_the_tail_of_the_held_out_gaps() -> None:
    """Exponential log-gaps below 1, of rate 1/20: the share below t is t^20."""
    quantiles = (np.arange(4_000) + 0.5) / 4_000
    gaps = (quantiles ** (1 / 20)).tolist()
    fitted = threshold_of(gaps[::-1])
    assert fitted.gap == pytest.approx((0.05 / 256) ** (1 / 20), rel=0.01)
    assert fitted.lowest == gaps[0]
    leaked = threshold_of([0.01, 0.2, *gaps])
    assert leaked.leaked == 2
    assert leaked.gap == fitted.gap
    with pytest.raises(ValueError, match="hold more out"):
        threshold_of(gaps[:63])


def test_thumbnails_are_of_the_central_square() -> None:
    wide = torch.zeros(1, 3, 64, 96, dtype=torch.uint8)
    wide[..., 16:80] = 200
    assert (thumbnails(wide) == 200).all()
    assert thumbnails(wide).shape == (1, 3, 32, 32)


# --- the index on disk --------------------------------------------------------------------------------------


class Counting:
    """A network's function that counts pictures, and is killed after so many."""

    def __init__(self, until: float = math.inf) -> None:
        self.seen = 0
        self.until = until

    def __call__(self, pictures: Tensor) -> Tensor:
        self.seen += len(pictures)
        if self.seen > self.until:
            raise KeyboardInterrupt
        return see(pictures)


def build(view: IndexView, folder: Path, count: Counting, sha256: str = "0" * 64) -> PictureIndex:
    return PictureIndex.build([view], network(sha256, count), folder, SIZE, shown=False)


def test_a_killed_build_goes_on_where_it_was(view: IndexView, index: PictureIndex, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(view, tmp_path, Counting(until=150))
    count = Counting()
    again = build(view, tmp_path, count)
    assert 120 <= count.seen < 150  # two shards of 60 were kept; portions of 16 are filled up
    assert [start for start, _ in again.portions()] == [0, 60, 120, 180]
    for (_, one), (_, other) in zip(index.portions(), again.portions(), strict=True):
        assert torch.equal(one.features, other.features)
        assert torch.equal(one.thumbnails, other.thumbnails)
    assert again.fingerprint() == index.fingerprint()
    finished = Counting()
    build(view, tmp_path, finished)
    assert finished.seen == 0


def test_an_index_of_another_network_or_data_is_made_again(
    view: IndexView, index: PictureIndex, tmp_path: Path
) -> None:
    build(view, tmp_path, Counting())
    count = Counting()
    other = build(view, tmp_path, count, sha256="1" * 64)
    assert count.seen >= TRAIN
    assert other.fingerprint() != index.fingerprint()
    half, count = IndexView(view.index, 1 << 63, 1 << 64), Counting()
    part = build(half, tmp_path, count, sha256="1" * 64)
    assert len(part) == len(half) < TRAIN
    assert count.seen >= len(half)
    keys = {part.place(number).key for number in range(len(part))}
    shard = view.index.shard(0)
    inside = [shard.key(int(row)) in keys for row in range(shard.count)]
    assert inside == half.keeps(0, shard).tolist()


def test_a_damaged_portion_is_made_again(view: IndexView, tmp_path: Path) -> None:
    build(view, tmp_path, Counting())
    first, second, *_ = sorted(tmp_path.glob("*.idx"))
    first.write_bytes(first.read_bytes()[:100])
    count = Counting()
    build(view, tmp_path, count)
    assert 60 <= count.seen < 120
    data = bytearray(second.read_bytes())
    data[-1000] ^= 1
    second.write_bytes(bytes(data))
    with pytest.raises(DataError, match="delete it and it is made again"):
        list(build(view, tmp_path, Counting()).portions())


def test_pictures_that_cannot_be_read_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = [encode(scene(1, number), SIZE) for number in range(5)]
    samples[2] = (samples[2][0], {**samples[2][1], "jpg": b"no picture"})
    write_shard(tmp_path / "0.tar", samples)
    found = build(IndexView(Index.open(str(tmp_path))), tmp_path / "index", Counting())
    assert [found.place(number).key[-1] for number in range(len(found))] == [
        samples[number][0][-1] for number in (0, 1, 3, 4)
    ]
    assert "1 of 5 pictures cannot be read" in caplog.text


def test_the_held_out_part_is_not_in_the_index(shards: Path, tmp_path: Path) -> None:
    train, val = open_split(str(shards), val_fraction=0.3)
    part = build(train, tmp_path, Counting())
    shard = train.index.shard(2)
    held = {shard.key(int(row)) for row in val.rows(2)}
    assert held
    assert not held & {part.place(number).key for number in range(len(part))}
