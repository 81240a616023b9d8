"""Odd and broken pictures of a collection: each is read as it should be, or refused for its reason."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.index import Index, IndexView
from data.order import Order
from data.shards import ShardDataset
from data.transforms import BadSample, Decoder, ResizeCrop
from data.writer import write_shard

#: First bytes -> the start of the reason. What begins as one of ours is damaged, the rest is something else.
REASONS = {
    b"\xff\xd8\xff": r"damaged: \w+", b"\x89PNG\r\n\x1a\n": r"damaged: \w+",
    b"GIF8": r"not an image \(image/gif\)", b"BM": r"not an image \(image/bmp\)",
    b"II*\0": r"not an image \(image/tiff\)", b"MM\0*": r"not an image \(image/tiff\)",
    b"II+\0": r"not an image \(image/tiff\)",
    b"\x89PNG\r\r": r"not an image \(unknown, starts with 89 50 4e 47 0d 0d 1a 0d\)",  # sent as text
    b"\xff\0": r"not an image \(unknown, starts with ff 00 00 00 00 00 00 00\)",
}  # fmt: skip
#: Those whose reason is their own.
NAMED = {
    "empty.jpg": r"empty file \(0 bytes\)$",
    "max_size.jpg": r"more than 67108864 pixels: Image size \(4294836225 pixels\)",
    "png_decompression_dos.png": r"damaged: ValueError\('Decompressed data too large",
    "null_height.jpg": r"damaged: begins as image/jpeg, but its header cannot be read$",
    "broken.png": r"damaged: begins as image/png, but its header cannot be read$",
    "truncated_image.png": r"damaged: OSError\('image file is truncated",
    "missing-sof.jpg": r"damaged: OSError\('Truncated File Read'\)",
}  # fmt: skip


@pytest.fixture(scope="module")
def pictures(shared_data: Path) -> list[tuple[dict[str, Any], bytes]]:
    """What is known of every picture, and its bytes."""
    folder = shared_data / "robustness"
    entries = json.loads((folder / "expected.json").read_text())
    return [(entry, (folder / entry["path"]).read_bytes()) for entry in entries]


def readable(entry: dict[str, Any]) -> bool:
    """Whether it is a whole picture of a format that is read."""
    return entry["ok"] and entry["fmt"] in ("JPEG", "PNG", "WEBP")


def wanted_reason(entry: dict[str, Any], data: bytes) -> str:
    """The pattern that the reason has to match."""
    named = NAMED.get(Path(entry["path"]).name)
    return named or next(reason for start, reason in REASONS.items() if data.startswith(start))


def outcome(decoder: Decoder, data: bytes) -> tuple[Image.Image | None, str, str]:
    """The decoded picture, or the field and the reason that it is refused for."""
    try:
        return decoder(data, "jpg"), "", ""
    except BadSample as error:
        return None, error.field, error.reason


def test_every_picture_is_read_or_refused_for_its_reason(pictures: list[Any]) -> None:
    decoder, wrong, read = Decoder(min_side=1, max_aspect=1e9), [], 0
    for entry, data in pictures:
        image, field, reason = outcome(decoder, data)
        if image is None:
            if readable(entry) or not re.match(wanted_reason(entry, data), reason):
                wrong.append(f"{entry['path']}: {reason}")
            assert field == "jpg"
            assert "\n" not in reason
            assert len(reason) < 260
            continue
        read += 1
        width, height = entry["size"]
        upright = (height, width) if entry.get("orient", 1) >= 5 else (width, height)
        if not readable(entry) or (image.size, image.mode) != (upright, "RGB"):
            wrong.append(f"{entry['path']}: {image.mode} {image.size}")
    assert wrong == []
    assert (len(pictures), read) == (226, sum(readable(entry) for entry, _ in pictures))
    assert {Path(entry["path"]).name for entry, _ in pictures} >= NAMED.keys()


def test_all_orientations_of_a_photograph_are_the_same(pictures: list[Any]) -> None:
    for shape in ("Landscape", "Portrait"):
        shown = {
            entry["orient"]: Decoder()(data, side=100).resize((60, 60))
            for entry, data in pictures
            if Path(entry["path"]).name.startswith(shape)
        }
        assert shown.keys() == set(range(9))
        upright = np.asarray(shown[1], np.int16)
        # Their photographer stored each one turned, and compressed it anew.
        assert all(np.abs(np.asarray(each, np.int16) - upright).mean() < 12 for each in shown.values())
        assert np.abs(np.asarray(shown[1].rotate(180), np.int16) - upright).mean() > 30


def test_in_a_shard_each_bad_one_is_replaced_and_written_down(pictures: list[Any], tmp_path: Path) -> None:
    samples = [(f"{k:03d}", {"jpg": data, "txt": b"a picture"}) for k, (_, data) in enumerate(pictures)]
    write_shard(tmp_path / "00000.tar", samples)
    view, bad = IndexView(Index.open(str(tmp_path / "00000.tar"))), tmp_path / "bad_samples.jsonl"
    dataset = ShardDataset(
        view, Order(view.counts, 0), Decoder(min_side=1, max_aspect=1e9), ResizeCrop(8), 0,
        bad_samples=bad, max_bad_fraction=1.0,
    )  # fmt: skip
    own = [sample for sample in (dataset[k] for k in range(len(pictures))) if not sample.substituted]
    entries = {line["key"]: line for line in map(json.loads, bad.read_text().splitlines())}
    refused = {f"{k:03d}" for k, (entry, _) in enumerate(pictures) if not readable(entry)}
    assert entries.keys() == refused
    assert {sample.key for sample in own} == {key for key, _ in samples} - refused
    for key, line in entries.items():
        entry, data = pictures[int(key)]
        assert (line["shard"], line["field"]) == (str(tmp_path / "00000.tar"), "jpg")
        assert re.match(wanted_reason(entry, data), line["reason"]), entry["path"]


def test_without_limits_nothing_small_is_lost_and_with_them_it_is_named(pictures: list[Any]) -> None:
    small = [(e, data) for e, data in pictures if readable(e) and min(e["size"]) < 8]
    assert len(small) > 8
    for entry, data in small:
        width, height = entry["size"]
        with pytest.raises(BadSample, match=f"{width}x{height} has a side below min_side=8"):
            Decoder()(data, "jpg")
    assert Image.MAX_IMAGE_PIXELS is not None  # the limit that finds the largest is still Pillow's own
