"""What is said of damaged shards and pictures: what and where, why, and what to do, in one line."""

import io
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.index import DataError, Index, IndexView, build_index, index_path, read_index
from data.order import Order
from data.shards import ShardDataset
from data.transforms import BadSample, Decoder, ResizeCrop
from data.writer import write_shard


def error_of(act: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def dataset(shard: Path, **options: object) -> ShardDataset:
    view = IndexView(Index.open(str(shard)))
    return ShardDataset(view, Order(view.counts, 0), Decoder(), ResizeCrop(8), 0, **options)


# --- shards -------------------------------------------------------------------------------------------------


def test_a_shard_that_is_not_the_indexed_one(make_shard) -> None:
    shard = make_shard()
    data = shard.read_bytes()
    shard.write_bytes(data + bytes(512))
    assert error_of(lambda: read_index(shard)) == (
        f"{shard}: {len(data) + 512} bytes, but its index says {len(data)}: the shard was cut or changed; "
        "copy it again, or delete 00000.tar.idx if the change is meant"
    )
    shard.write_bytes(data[:700] + bytes([data[700] ^ 1]) + data[701:])
    said = error_of(lambda: read_index(shard, verify=True))
    assert re.fullmatch(
        rf"{shard}: SHA-256 is [0-9a-f]{{64}}, its index says [0-9a-f]{{64}}; copy the shard again", said
    )


@pytest.mark.parametrize("cut", [100, 512, 700, 1024])  # in a header, after it, in the data, between members
def test_a_cut_shard_without_an_index(make_shard, cut: int) -> None:
    shard = make_shard(count=2)
    index_path(shard).unlink()
    os.truncate(shard, cut)
    said = error_of(lambda: Index.open(str(shard)))
    assert re.fullmatch(rf"{shard}: cut off at byte {cut}, inside .+; copy or make the shard again", said)
    assert not index_path(shard).exists()


def test_a_flipped_header(make_shard) -> None:
    shard = make_shard(count=2)
    data = bytearray(shard.read_bytes())
    data[3] ^= 1
    shard.write_bytes(data)
    said = error_of(lambda: build_index(shard))
    assert re.fullmatch(
        rf"{shard}: the header at byte 0 is damaged \(checksum \d+, expected \d+\); "
        r"copy or make the shard again",
        said,
    )


def test_a_flipped_payload_names_key_field_and_both_checksums(make_shard) -> None:
    shard = make_shard()
    index, data = build_index(shard), bytearray(shard.read_bytes())
    data[index.extent(2, "txt").offset] ^= 1
    shard.write_bytes(data)
    said = error_of(lambda: [dataset(shard, max_bad_fraction=0.0)[i] for i in range(5)])
    assert re.fullmatch(
        rf"1 bad samples, 0 of 5 allowed, the last one {shard} key '00002' txt: crc32c is [0-9a-f]+, "
        r"its index says [0-9a-f]+; make the shards again, or raise data.max_bad_fraction",
        said,
    )


def test_a_disk_that_fails(make_shard, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = make_shard()
    data = dataset(shard)

    def failing(handle: int, size: int, offset: int) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("data.reader.FIRST_WAIT", 0.0)
    monkeypatch.setattr("os.pread", failing)
    said = error_of(lambda: data[0])
    assert re.fullmatch(
        rf"{shard} key '0000\d' field \w+: read failed 4 times \(Input/output error\); check the disk", said
    )


def test_keys_that_occur_twice(make_shard, make_image, tmp_path: Path) -> None:
    make_shard("s/00000.tar", 3)
    make_shard("s/00001.tar", 3, first=2)
    said = error_of(lambda: Index.open(str(tmp_path / "s")))
    first, second = (tmp_path / "s" / f"0000{k}.tar" for k in range(2))
    assert said.startswith(f"key '00002' occurs in {first} and in {second} (1 such keys")
    assert said.endswith("write the shards again with keys that are unique")


# --- pictures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_picture_cut_in_its_data_is_damaged_and_never_filled_up(make_image, form: str) -> None:
    data = make_image(1, (64, 64), form)
    with pytest.raises(
        BadSample, match=r"^jpg: damaged: OSError\('(image file is truncated|could not create)"
    ):
        Decoder()(data[: len(data) * 4 // 5], "jpg")


@pytest.mark.parametrize(
    ("data", "kind"), [(b"\xff\xd8\xff\xd9junk", "jpeg"), (b"\x89PNG\r\n\x1a\njunk", "png"),
    (b"RIFF\x08\0\0\0WEBPjunk", "webp")],
)  # fmt: skip
def test_a_damaged_header_is_told_from_what_is_no_picture(data: bytes, kind: str) -> None:
    with pytest.raises(BadSample) as caught:
        Decoder()(data, "jpg")
    assert caught.value.reason == f"damaged: begins as image/{kind}, but its header cannot be read"


INKS = {
    (0, 0, 0, 0): (255, 255, 255), (255, 0, 0, 0): (0, 255, 255), (0, 255, 0, 0): (255, 0, 255),
    (0, 0, 255, 0): (255, 255, 0), (0, 0, 0, 255): (0, 0, 0), (0, 0, 0, 128): (127, 127, 127),
    (128, 64, 0, 0): (127, 191, 255),
}  # fmt: skip


def jpeg_of_inks(ink: tuple[int, ...], transformed: bool) -> bytes:
    """A CMYK JPEG as Adobe writes them, inverted; `transformed` to YCCK, of which the marker tells."""
    stored = ink
    if transformed:  # the decoder turns (Y, Cb, Cr) into RGB and that into inks; Pillow inverts all bytes
        y, cb, cr = Image.new("RGB", (1, 1), ink[:3]).convert("YCbCr").getpixel((0, 0))
        stored = (255 - y, 255 - cb, 255 - cr, ink[3])
    buffer = io.BytesIO()
    Image.new("CMYK", (16, 16), stored).save(buffer, "JPEG", quality=100)
    data = buffer.getvalue()
    place = data.index(b"Adobe") + 11
    assert data[place] == 0
    return data[:place] + struct.pack("B", 2 * transformed) + data[place + 1 :]


@pytest.mark.parametrize("transformed", [False, True])
@pytest.mark.parametrize("ink", INKS)
def test_inks_become_the_colours_they_print(ink: tuple[int, ...], transformed: bool) -> None:
    pixels = np.asarray(Decoder()(jpeg_of_inks(ink, transformed), "jpg"), np.int16)
    assert np.abs(pixels - INKS[ink]).max() <= 4


def test_colour_under_transparent_pixels_never_shows() -> None:
    """Every mode with alpha, of a red that nobody sees."""
    red = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    palette = red.convert("RGB").quantize(4)
    for image, options in ((red, {}), (red.convert("LA"), {}), (palette, {"transparency": 0})):
        buffer = io.BytesIO()
        image.save(buffer, "PNG", **options)
        shown = np.asarray(Decoder(background=(0, 0, 255))(buffer.getvalue(), "png"))
        assert (shown == [0, 0, 255]).all(), image.mode


def test_an_image_and_its_caption_stay_together_around_a_failing_read(
    make_shard, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A read that fails in one shard, and comes through later, pairs nothing with the next shard's texts."""
    for number in range(2):
        grays = [60 * number + 20 * k for k in range(3)]
        fields = [{"jpg": make_jpeg(gray), "txt": str(gray).encode()} for gray in grays]
        write_shard(tmp_path / f"{number}.tar", [(f"{number}-{k}", f) for k, f in enumerate(fields)])
    data, real, calls = dataset(tmp_path), os.pread, [0]

    def failing(handle: int, size: int, offset: int) -> bytes:
        calls[0] += 1
        if calls[0] % 3 == 1:
            raise OSError(5, "Input/output error")
        return real(handle, size, offset)

    monkeypatch.setattr("data.reader.FIRST_WAIT", 0.0)
    monkeypatch.setattr("os.pread", failing)
    for index in range(12):
        sample = data[index]
        assert abs(float(sample.pixels.float().mean()) - int(sample.caption)) < 3
    assert calls[0] > 12


def make_jpeg(gray: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (gray, gray, gray)).save(buffer, "JPEG", quality=100)
    return buffer.getvalue()
