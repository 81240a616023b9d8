"""Picture files carry their record through every format, and tell a changed picture from one that was not."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data.pictures import (
    Look,
    PictureFormat,
    as_mask,
    encode_picture,
    fit,
    read_mask,
    read_picture,
    read_record,
)
from data.shard_index import DataError

RECORD = {"prompt": 'a dawn, "日本" \U0001f305 אבג', "seed": 7, "size": [24, 16], "guidance": None}


@pytest.fixture
def pixels(rng: torch.Generator) -> Tensor:
    small = torch.randint(0, 256, (1, 3, 4, 6), generator=rng).float()
    return torch.nn.functional.interpolate(small, scale_factor=4.0, mode="bilinear")[0].to(torch.uint8)


@pytest.mark.parametrize("kind", PictureFormat)
@pytest.mark.parametrize("watermark", ["", "mine"])
def test_the_record_comes_back(kind: PictureFormat, watermark: str, pixels: Tensor, tmp_path: Path) -> None:
    path = tmp_path / f"a{kind.value}"
    path.write_bytes(encode_picture(pixels, Look(kind, 90, watermark), RECORD))
    record, intact = read_record(path)
    assert intact
    assert {**record, "pixels_sha256": None} == {**RECORD, "pixels_sha256": None}
    with Image.open(path) as image:
        assert image.size == (24, 16)
        shown = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    changed = (shown.int() - pixels.int()).abs()
    if kind is PictureFormat.png and not watermark:
        assert not changed.any()
    if watermark:
        assert changed[:, 8:].max() > 40


@pytest.mark.parametrize("kind", PictureFormat)
def test_a_changed_picture_is_told(kind: PictureFormat, pixels: Tensor, tmp_path: Path) -> None:
    path = tmp_path / f"a{kind.value}"
    path.write_bytes(encode_picture(pixels, Look(kind), RECORD))
    with Image.open(path) as image:
        image.load()
        kept = {"pnginfo": None, "comment": image.info.get("comment"), "exif": image.getexif()}
        if kind is PictureFormat.png:
            from PIL.PngImagePlugin import PngInfo

            info = PngInfo()
            info.add_itxt("firstlight", image.text["firstlight"])  # type: ignore[attr-defined]
            kept = {"pnginfo": info}
        other = Image.new("RGB", image.size, (9, 9, 9))
    other.save(path, **{key: value for key, value in kept.items() if value})
    record, intact = read_record(path)
    assert record["seed"] == 7
    assert not intact


def test_pictures_without_a_record(pixels: Tensor, tmp_path: Path) -> None:
    for kind in PictureFormat:
        path = tmp_path / f"plain{kind.value}"
        Image.new("RGB", (8, 8)).save(path)
        with pytest.raises(DataError, match=r"plain\.\w+ holds no record of Firstlight's"):
            read_record(path)
    for name, content, said in (
        ("text.png", b"hello", "is no whole PNG, JPEG or WebP"),
        ("cut.png", encode_picture(pixels, Look(), RECORD)[:200], "is no whole PNG, JPEG or WebP"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=said):
            read_record(tmp_path / name)
    with pytest.raises(DataError, match="there is no file"):
        read_record(tmp_path / "absent.png")
    with pytest.raises(DataError, match="is a folder"):
        read_record(tmp_path)


@pytest.mark.parametrize("text", ["[1, 2]", "{", "7", '"a"'])
def test_a_damaged_record_is_none(text: str, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", comment=f"firstlight {text}".encode())
    with pytest.raises(DataError, match="holds no record"):
        read_record(tmp_path / "a.jpg")


def test_a_quality_out_of_range() -> None:
    for quality in (0, 101):
        with pytest.raises(ValueError, match=f"quality is {quality}, but must be from 1 to 100"):
            Look(quality=quality)


def test_reading_pictures_and_masks(pixels: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encode_picture(pixels, Look(), {}))
    assert torch.equal(fit(read_picture(path, "image"), 24, 16), pixels)
    assert fit(read_picture(path, "image"), 8, 8).shape == (3, 8, 8)
    with pytest.raises(DataError, match=r"image: there is no file .*none.png"):
        read_picture(tmp_path / "none.png", "image")
    (tmp_path / "b.png").write_bytes(b"BM not a picture")
    with pytest.raises(DataError, match=r"image: .*b.png cannot be used, .*; give a PNG, JPEG or WebP"):
        read_picture(tmp_path / "b.png", "image")
    mask = Image.new("L", (24, 16))
    mask.paste(255, (0, 0, 12, 16))
    mask.save(tmp_path / "mask.png")
    read = as_mask(read_mask(tmp_path / "mask.png", Image.new("RGB", (24, 16))), 24, 16)
    assert read[:, :12].min() == 1
    assert read[:, 12:].max() == 0
    small = as_mask(mask, 8, 8)  # the central square of it, as of the picture
    assert small[:, :3].min() == 1
    assert small[:, 5:].max() == 0
    with pytest.raises(DataError, match=r"mask: .* is 24x16, the picture 16x16; make them one size"):
        read_mask(tmp_path / "mask.png", Image.new("RGB", (16, 16)))


def test_the_record_is_json_that_others_can_read(pixels: Tensor, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode_picture(pixels, Look(), RECORD))
    with Image.open(tmp_path / "a.png") as image:
        assert json.loads(image.text["firstlight"])["prompt"] == RECORD["prompt"]  # type: ignore[attr-defined]
