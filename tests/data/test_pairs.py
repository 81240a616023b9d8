"""Pairs in shards: both pictures are found, cropped and mirrored alike, and a broken pair is a bad sample."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.batch import Collate
from data.datamodule import DataModule, ShardData
from data.index import DataError
from data.index_builder import split_name
from data.tar import TarError
from data.writer import write_shard


def picture(number: int, size: tuple[int, int] = (48, 32), form: str = "PNG") -> bytes:
    """A picture whose every pixel tells its place: red across, green down, blue the number."""
    width, height = size
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width).astype(np.uint8)
    pixels[..., 1] = np.linspace(0, 255, height).astype(np.uint8)[:, None]
    pixels[..., 2] = number
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def write(folder: Path, count: int = 40, **broken: bytes | None) -> Path:
    """A folder of pairs that look alike but for their blue; `broken` replaces fields of sample 3."""
    samples = []
    for number in range(count):
        fields: dict[str, bytes | None] = {
            "png": picture(number), "before.png": picture(100 + number), "txt": b"change it",
        }  # fmt: skip
        if number == 3:
            fields |= {name.replace("_", "."): value for name, value in broken.items()}
        samples.append((f"{number:03d}", {name: data for name, data in fields.items() if data is not None}))
    (folder / "train").mkdir(parents=True)
    (folder / "val").mkdir()
    write_shard(folder / "train" / "0.tar", samples)
    held_out = {"png": picture(201), "before.png": picture(202), "txt": b"change it"}
    write_shard(folder / "val" / "0.tar", [(f"held-out-{number}", held_out) for number in range(2)])
    return folder


def options(folder: Path, **more: object) -> ShardData:
    return ShardData(str(folder), resolution=16, before="before", workers=0, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("buckets", [1, 3])
def test_crop_and_flip_are_the_same_for_both(tmp_path: Path, buckets: int) -> None:
    data = options(write(tmp_path), random_crop=True, flip=True, buckets=buckets, max_aspect=1.5)
    train, val = data.open(0)
    starts, mirrored = set(), set()
    for number in range(len(train)):
        sample = train[number]
        assert sample.before is not None
        assert torch.equal(sample.pixels[:2], sample.before[:2])
        assert (sample.before[2].int() - sample.pixels[2] == 100).all()
        starts.add(int(sample.pixels[0].min()))
        mirrored.add(bool(sample.pixels[0, 0, 0] > sample.pixels[0, 0, -1]))
    assert mirrored == {True, False}
    assert buckets > 1 or len(starts) > 3
    assert val[0].before is not None


def test_batches_carry_both(tmp_path: Path) -> None:
    train, val = options(write(tmp_path)).open(0)
    module = DataModule(train, val, lambda texts: torch.zeros(len(texts), 2, dtype=torch.int64), 8, workers=0)
    for batch in (next(iter(module.train_loader(0, 8))), module.probe(4), module.held_out(2)):
        assert batch.before is not None
        assert batch.before.dtype == torch.uint8
        assert batch.before.shape == batch.pixels.shape == (len(batch), 3, 16, 16)
        assert torch.equal(batch.before[:, :2], batch.pixels[:, :2])
        assert batch.images_before.min() >= -1
        assert batch.to("meta").before.device.type == "meta"  # type: ignore[union-attr]


def test_pictures_alone_have_no_picture_before(tmp_path: Path) -> None:
    train, _ = ShardData(str(write(tmp_path)), resolution=16).open(0)
    batch = Collate(lambda texts: torch.zeros(len(texts), 2, dtype=torch.int64))([train[0], train[1]])
    assert batch.before is None
    assert batch.to("cpu").before is None
    with pytest.raises(ValueError, match=r"data\.before"):
        _ = batch.images_before


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ({"before_png": None}, "no picture before the edit"),
        ({"before_png": b"GIF89a nothing"}, "image/gif"),
        ({"before_png": picture(9, (32, 32))}, "32x32, and the picture after it 48x32"),
    ],
)
def test_a_broken_pair_is_a_bad_sample(tmp_path: Path, broken: dict[str, bytes | None], reason: str) -> None:
    folder, log = write(tmp_path / "shards", 40, **broken), tmp_path / "bad.jsonl"
    train, _ = options(folder, max_bad_fraction=0.1).open(0, log)
    keys = [train[number].key for number in range(len(train))]
    assert "003" not in keys
    assert len(keys) == 40
    (line,) = map(json.loads, log.read_text().splitlines())
    assert (line["key"], line["field"]) == ("003", "before.jpg" if "no picture" in reason else "before.png")
    assert reason in line["reason"]


def test_two_formats_of_one_size_are_a_pair(tmp_path: Path) -> None:
    """A large JPEG is decoded smaller than a PNG; the pair is one all the same."""
    fields = {"png": picture(0, (480, 320)), "before.jpg": picture(0, (480, 320), "JPEG"), "txt": b"x"}
    write_shard(tmp_path / "0.tar", [(str(number), fields) for number in range(4)])
    sample = options(tmp_path, val_fraction=0.0).open(0)[0][0]
    assert sample.before is not None
    assert (sample.before.float() - sample.pixels.float()).abs().mean() < 6


def test_shards_without_the_field_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"before=source, but no sample has a field source\.jpg"):
        ShardData(str(write(tmp_path)), resolution=16, before="source").open(0)


@pytest.mark.parametrize(
    ("values", "said"),
    [({"before": "after"}, "must be one of before"), ({"precomputed": "x"}, "leave out one")],
)
def test_options_that_make_no_sense_are_refused(values: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ShardData("shards", **({"before": "before"} | values))  # type: ignore[arg-type]


def test_only_names_of_second_pictures_may_have_a_dot() -> None:
    assert split_name("a/7.before.JPG") == ("a/7", "before.jpg")
    for name in ("7.holiday.jpg", "7.before.txt", "7.before.before.jpg"):
        with pytest.raises(TarError, match="dotted key"):
            split_name(name)
