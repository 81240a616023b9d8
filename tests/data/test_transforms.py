"""Decoding is strict and shows what a viewer would, captions are cleaned, crops follow the draws."""

import contextlib
import io
import json
import pickle
import resource
import struct
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from data.transforms import BadSample, Decoder, ResizeCrop, decode_caption, decode_json, image_size


def saved(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def decoded(data: bytes, **options: object) -> np.ndarray:
    image = Decoder(**options)(data, "png")
    assert image.mode == "RGB"
    return np.asarray(image)


def reason(data: bytes, **options: object) -> str:
    with pytest.raises(BadSample) as caught:
        Decoder(**options)(data, "jpg")
    assert caught.value.field == "jpg"
    assert "\n" not in caught.value.reason
    assert len(caught.value.reason) < 260
    return caught.value.reason


def png_of_size(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


FLAT = Image.new("RGB", (16, 16), (10, 200, 90))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_the_three_formats_are_read(form: str) -> None:
    pixels = decoded(saved(FLAT, form))
    assert np.abs(pixels.astype(int) - [10, 200, 90]).max() <= 3


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF", "EPS", "PDF", "PPM", "ICO"])
def test_all_other_formats_are_refused_and_named(form: str) -> None:
    assert reason(saved(FLAT, form)).startswith("not an image (")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty file (0 bytes)"),
        (b"\n<!DOCTYPE html><p>", "text/html"),
        (b'{"error": 404}', "application/json"),
        (b"%!PS-Adobe-3.0 EPSF", "application/postscript"),
        (b"GIF89a", "image/gif"),
        (b"\0\0\0\x20ftypavif", "image/avif"),
        (b"\x01\x02", "unknown, starts with 01 02"),
    ],
)
def test_what_is_no_picture_is_named(data: bytes, message: str) -> None:
    assert message in reason(data)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("progressive", [False, True])
def test_every_cut_is_refused_or_loses_no_pixel(form: str, progressive: bool, make_image) -> None:
    data = make_image(1, (40, 40), form, **({"progressive": True} if progressive and form == "JPEG" else {}))
    whole, refused = decoded(data), 0
    cuts = range(1, len(data), 13)
    for cut in cuts:
        try:
            assert np.array_equal(decoded(data[:cut]), whole)  # only a checksum or an end mark is lost
        except BadSample:
            refused += 1
    assert refused >= len(cuts) - 2


def test_sizes_are_refused_from_the_header(make_image) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "more than 67108864 pixels: Image size (400000000 pixels)" in reason(png_of_size(20000, 20000))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
    assert "9000x9000 is more than max_pixels=67108864" in reason(png_of_size(9000, 9000))
    assert "1x1 has a side below min_side=8" in reason(make_image(size=(1, 1)))
    assert "3x5000 has a side below" in reason(make_image(size=(3, 5000), form="PNG"))
    assert "10x200 is longer than max_aspect=16" in reason(make_image(size=(10, 200)))
    assert decoded(make_image(size=(10, 200)), max_aspect=20).shape == (200, 10, 3)


def test_transparency_is_laid_on_the_background() -> None:
    hidden = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    half = Image.new("LA", (8, 8), (0, 128))
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert (decoded(saved(hidden)) == 255).all()
    assert (decoded(saved(hidden), background=(1, 2, 3)) == [1, 2, 3]).all()
    assert (decoded(saved(hidden, "WEBP", lossless=True)) == 255).all()
    assert np.abs(decoded(saved(half)).astype(int) - 127).max() <= 1
    assert (decoded(saved(palette)) == [255, 0, 0]).all()
    assert (decoded(saved(palette, transparency=1)) == 255).all()
    assert (decoded(saved(palette, transparency=b"\xff\0")) == 255).all()
    assert (decoded(saved(Image.new("RGB", (8, 8), (9, 9, 9)), transparency=(9, 9, 9))) == 255).all()
    assert (decoded(saved(Image.new("L", (8, 8), 9), transparency=9)) == 255).all()
    assert (decoded(saved(Image.new("1", (8, 8), 0))) == 0).all()
    with pytest.raises(ValueError, match="background="):
        Decoder(background=(0, 0))


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    values = np.full((8, 8), 40000, np.uint16)
    assert (decoded(saved(Image.fromarray(values))) == round(40000 / 257)).all()
    assert (decoded(saved(Image.fromarray(values), transparency=40000)) == 255).all()
    assert (decoded(saved(Image.fromarray(values * 0 + 65535))) == 255).all()


def test_cmyk_is_converted() -> None:
    ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # magenta and yellow ink: red
    pixels = decoded(saved(ink, "JPEG", quality=95)).astype(int)
    assert np.abs(pixels - [255, 0, 0]).max() <= 4


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_all_orientations_show_the_same_picture(form: str, make_image) -> None:
    upright = Image.open(io.BytesIO(make_image(3, (32, 16), "PNG")))
    undo = {
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    for orientation, turn in undo.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = upright.transpose(turn) if turn is not None else upright
        data = saved(stored, form, exif=exif, **({"quality": 100} if form != "PNG" else {}))
        assert np.abs(decoded(data).astype(int) - np.asarray(upright)).mean() < 4, orientation
        if form != "PNG":
            assert image_size(data) == (32, 16)


def test_damaged_exif_loses_no_picture() -> None:
    assert decoded(saved(FLAT, "JPEG", exif=b"Exif\0\0II*\0garbage!")).shape == (16, 16, 3)


def test_a_profile_is_converted_to_srgb() -> None:
    """A profile with red and green exchanged must exchange them in the picture."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    named = profile.replace(b"s\0R\0G\0B", b"x\0R\0G\0B")
    swapped = named.replace(b"rXYZ", b"tmp!", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"tmp!", b"gXYZ", 1)
    red = Image.new("RGB", (16, 16), (255, 0, 0))
    pixels = decoded(saved(red, icc_profile=swapped)).astype(int)
    assert np.abs(pixels - [0, 255, 0]).max() <= 3
    assert (decoded(saved(red, icc_profile=profile)) == [255, 0, 0]).all()
    assert (decoded(saved(red, icc_profile=b"no profile")) == [255, 0, 0]).all()
    assert decoded(saved(red.convert("L"), icc_profile=swapped)).shape == (16, 16, 3)


@pytest.mark.parametrize("form", ["WEBP", "PNG"])
def test_the_first_frame_is_taken(form: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    data = saved(frames[0], form, save_all=True, append_images=frames[1:], duration=10)
    assert np.abs(decoded(data).astype(int) - [255, 0, 0]).max() <= 3


def test_drafts_are_as_large_as_asked(make_image) -> None:
    data = make_image(0, (640, 400))
    assert Decoder()(data, side=50).size == (160, 100)
    assert Decoder()(data, side=66).size == (160, 100)
    assert Decoder()(data, side=70).size == (320, 200)
    assert Decoder()(data).size == (640, 400)


def test_a_png_profile_bomb_is_refused() -> None:
    bomb = saved(FLAT, icc_profile=bytes(1 << 25))
    assert len(bomb) < 1 << 16
    assert "damaged" in reason(bomb)


def test_image_size_of_what_is_not_read() -> None:
    for data in (b"", b"<html>", saved(FLAT, "GIF"), saved(FLAT, "EPS"), saved(FLAT, "TIFF")):
        assert image_size(data) == (0, 0)


def test_bad_samples_travel_between_processes() -> None:
    again = pickle.loads(pickle.dumps(BadSample("jpg", "why")))
    assert (again.field, again.reason, str(again)) == ("jpg", "why", "jpg: why")


def test_real_damaged_pictures_are_told_from_whole_ones(shared_data: Path) -> None:
    folder, differ, read = shared_data / "robustness", [], 0
    for entry in json.loads((folder / "expected.json").read_text()):
        size = entry.get("size", [0, 0])
        if size[0] * size[1] > 600_000:
            continue
        try:
            Decoder(min_side=1, max_aspect=1e9)((folder / entry["path"]).read_bytes())
            whole = True
        except BadSample:
            whole = False
        read += whole
        if whole != (entry["ok"] and entry.get("fmt") in ("JPEG", "PNG", "WEBP")):
            differ.append(entry["path"])
    assert differ == []
    assert read > 50


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_captions_are_clean_and_stay_so(text: str) -> None:
    clean = decode_caption(text.encode())
    assert decode_caption(clean.encode()) == clean
    assert clean == " ".join(clean.split())
    assert not any(unicodedata.category(c) == "Cc" for c in clean)


@given(st.text(st.characters(max_codepoint=0x2FF), max_size=40))
@settings(max_examples=300, deadline=None)
def test_plain_captions_come_to_the_same_by_the_short_way(text: str) -> None:
    # What no short way is taken for: a word outside of ASCII at the end.
    assert decode_caption(f"{text} é".encode()) == f"{decode_caption(text.encode())} é".strip()


def test_captions() -> None:
    assert decode_caption("\ufeff a\tred\n\n  \x1b[31mcafe\u0301\0 ".encode()) == "a red [31mcafé"
    assert decode_caption("\u202eabc\u2069 👩\u200d🚀".encode()) == "abc 👩\u200d🚀"
    assert decode_caption(b" \n") == ""


@pytest.mark.parametrize(
    ("data", "message"), [(b"ab\xff", "no UTF-8 at byte 2"), ("x".encode("utf-16"), "UTF-16 text"),
    (b"\xed\xa0\x80", "no UTF-8 at byte 0"),
     (b"x" * 20000, "caption of 20000 bytes, at most 16384")],
)  # fmt: skip
def test_bad_captions_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(BadSample, match=message):
        decode_caption(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [(b'{"a": }', "column 7"), (b"[1]", "holds a list"), (b'{"a": NaN}', "NaN is no JSON number"),
     (b'{"a": 1, "a": 2}', "name 'a' occurs twice"), (b"[" * 200_000, "nested too deep"), (b" " * 300_000,
     "JSON of 300000 bytes"), (b'{"a": "\xff"}', "bad JSON"), (b'{"a":' + b"9" * 5000 + b"}", "bad JSON")],
)  # fmt: skip
def test_bad_json_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(BadSample, match=message):
        decode_json(data)


def test_json() -> None:
    assert decode_json(b'\xef\xbb\xbf{"a": [1, null]}') == {"a": [1, None]}


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_no_bytes_break_the_decoders(data: bytes) -> None:
    for decode in (Decoder(), decode_caption, decode_json):
        for body in (data, b"\x89PNG\r\n\x1a\n" + data, b"\xff\xd8\xff" + data, b"RIFF\x60\0\0\0WEBP" + data):
            with contextlib.suppress(BadSample):
                decode(body, "x")


def ramp(width: int, height: int) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, x * 0], -1).astype(np.uint8))


def test_crops() -> None:
    centre = ResizeCrop(8)(ramp(64, 32), 0.0, 0.0, 0.0)
    assert centre.shape == (3, 8, 8)
    assert centre.dtype == torch.uint8
    assert centre.is_contiguous()
    assert abs(centre[0].float().mean() - 127.5) < 1.5
    crop = ResizeCrop(8, random_crop=True)
    left, right = (crop(ramp(64, 32), x, 0.5)[0].float().mean() for x in (0.0, 1 - 1e-9))
    assert abs(left - 63) < 2
    assert abs(right - 191) < 2
    assert abs(crop(ramp(32, 64), 0.5, 1 - 1e-9)[1].float().mean() - 191) < 2
    assert ResizeCrop(64)(ramp(16, 12)).shape == (3, 64, 64)
    with pytest.raises(ValueError, match="resolution=0"):
        ResizeCrop(0)


@pytest.mark.parametrize("size", [(96, 80), (31, 47), (24, 300), (10, 8)])
def test_pixels_are_those_of_pillow(size: tuple[int, int]) -> None:
    values = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    picture = Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)
    side = min(size)
    left, top = ((length - side + 1) // 2 for length in size)
    part = picture.crop((left, top, left + side, top + side)).resize((24, 24), Image.Resampling.BICUBIC)
    difference = ResizeCrop(24)(picture).permute(1, 2, 0).int().numpy() - np.asarray(part).astype(int)
    assert np.abs(difference).max() <= 1


def test_a_crop_is_of_whole_pixels_and_every_place_has_its_share() -> None:
    picture, crop = ramp(20, 16), ResizeCrop(16, random_crop=True)
    pixels = np.asarray(picture).transpose(2, 0, 1)
    for left in range(5):
        for x in (left / 5 + 1e-9, (left + 1) / 5 - 1e-9):
            assert np.array_equal(crop(picture, x, 0.5).numpy(), pixels[:, :, left : left + 16])


@pytest.mark.parametrize("target", [(24, 16), (16, 40), (8, 8)])
def test_the_part_has_the_shape_of_the_target(target: tuple[int, int]) -> None:
    pixels = ResizeCrop(16)(ramp(120, 120), target=target)
    assert pixels.shape == (3, target[1], target[0])
    # What is cut off lies evenly on both sides, and nothing is stretched: levels rise alike both ways.
    steps = [float(pixels[c].float().mean(c).diff().mean()) for c in (0, 1)]
    assert steps[0] == pytest.approx(steps[1], rel=0.08)
    assert float(pixels[0].float().mean()) == pytest.approx(127, abs=1.5)


def test_flips_follow_the_draw_and_only_where_asked() -> None:
    picture = ramp(16, 16)
    plain = ResizeCrop(8)(picture, mirror=0.0)
    assert torch.equal(ResizeCrop(8, flip=True)(picture, mirror=0.4999), plain.flip(2))
    assert torch.equal(ResizeCrop(8, flip=True)(picture, mirror=0.5), plain)


def test_a_picture_of_the_right_size_is_untouched() -> None:
    picture = ramp(16, 16)
    assert np.array_equal(ResizeCrop(16)(picture).permute(1, 2, 0).numpy(), np.asarray(picture))


def test_resizing_is_antialiased() -> None:
    board = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    assert (ResizeCrop(16)(board).float() - 127.5).abs().max() < 8
