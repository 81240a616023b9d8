"""Picture files: read for editing, written with a record of what made them inside, and verified.

The record is a flat JSON object. It travels in the file itself, a PNG's `iTXt`, a JPEG's comment or a WebP's
EXIF description, with the SHA-256 of the file's pixels, so that a copy that was edited since is told from one
that was not. The pixels are hashed as a viewer decodes them, after lossy compression.

    Path("a.png").write_bytes(encode_picture(pixels, Look(), {"prompt": "a dawn", "seed": 7}))
    record, intact = read_record(Path("a.png"))
"""

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from data.decoder import Decoder
from data.fields import BadSample
from data.shard_index import DataError
from data.transforms import ResizeCrop

KEY = "firstlight"
DESCRIPTION = 0x010E  # EXIF's ImageDescription
MAX_BYTES = 1 << 28


class PictureFormat(Enum):
    """What pictures are written as; the value is the file's suffix."""

    png = ".png"
    jpg = ".jpg"
    webp = ".webp"


@dataclass(frozen=True)
class Look:
    """How pictures are written: `quality` 1 to 100 of JPEG and WebP, and a visible `watermark`, "" for none.

    Raises ValueError for a quality out of range.
    """

    format: PictureFormat = PictureFormat.png
    quality: int = 95
    watermark: str = ""

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality is {self.quality}, but must be from 1 to 100")


def read_picture(path: Path, label: str) -> Image.Image:
    """Returns the picture at `path`, upright and RGB; raises DataError that begins with `label`."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{label}: {path} has more than {MAX_BYTES >> 20} MiB; make it smaller")
        return Decoder()(path.read_bytes(), label)
    except FileNotFoundError:
        raise DataError(f"{label}: there is no file {path}") from None
    except BadSample as error:
        raise DataError(f"{label}: {path} cannot be used, {error.reason}; give a PNG, JPEG or WebP") from None


def fit(image: Image.Image, width: int, height: int) -> Tensor:
    """Returns uint8 [3 H W]: the largest central part of that shape, resized; one of that size as it is."""
    if image.size == (width, height):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return ResizeCrop(max(width, height))(image, target=(width, height))


def read_mask(path: Path, image: Image.Image) -> Image.Image:
    """Returns the mask of `image`, white where it is to be painted anew.

    Raises DataError where the file cannot be read or is of another size than the picture.
    """
    mask = read_picture(path, "mask")
    if mask.size != image.size:
        raise DataError(
            f"mask: {path} is {mask.width}x{mask.height}, the picture {image.width}x{image.height}; make "
            "them one size"
        )
    return mask


def as_mask(mask: Image.Image, width: int, height: int) -> Tensor:
    """Returns float32 [H W] in [0, 1], 1 where `mask` is white, cut and resized as `fit` does."""
    return fit(mask.convert("L").convert("RGB"), width, height)[0].float() / 255


def encode_picture(pixels: Tensor, look: Look, record: Mapping[str, Any]) -> bytes:
    """Returns a file's bytes for `pixels` uint8 [3 H W], with `record` and the hash of its pixels inside."""
    image = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
    if look.watermark:
        image = _marked(image, look.watermark)
    seen = image
    if look.format is not PictureFormat.png:
        seen = Image.open(io.BytesIO(_compressed(image, look, b"")))
    text = json.dumps({**record, "pixels_sha256": pixels_sha256(seen)}, ensure_ascii=False)
    return _compressed(image, look, text.encode())


def pixels_sha256(image: Image.Image) -> str:
    """Returns the SHA-256, in hex, of a picture's size and RGB bytes."""
    head = f"{image.width}x{image.height} RGB\n".encode()
    return hashlib.sha256(head + image.convert("RGB").tobytes()).hexdigest()


def read_record(path: Path) -> tuple[dict[str, Any], bool]:
    """Returns the record in a picture's file, and whether the pixels are still those it was written with.

    Raises DataError where there is no such file, no picture, or no record in it.
    """
    none = f"verify: {path} holds no record of Firstlight's; it was made by something else, or stripped"
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
            image.load()
            text = _embedded(image)
            if text is None:
                raise DataError(none)
            record = json.loads(text)
            intact = isinstance(record, dict) and record.get("pixels_sha256") == pixels_sha256(image)
    except FileNotFoundError:
        raise DataError(f"verify: there is no file {path}") from None
    except IsADirectoryError:
        raise DataError(f"verify: {path} is a folder; give a picture in it") from None
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, OSError) as error:
        raise DataError(f"verify: {path} is no whole PNG, JPEG or WebP ({error})") from None
    except ValueError:
        raise DataError(none) from None
    if not isinstance(record, dict):
        raise DataError(none)
    return record, intact


def _compressed(image: Image.Image, look: Look, record: bytes) -> bytes:
    """Returns the file's bytes; `record` is UTF-8, b"" for none."""
    buffer = io.BytesIO()
    if look.format is PictureFormat.png:
        info = PngImagePlugin.PngInfo()
        if record:
            info.add_itxt(KEY, record.decode())
        image.save(buffer, "PNG", pnginfo=info)
    elif look.format is PictureFormat.jpg:
        comment = f"{KEY} ".encode() + record
        image.save(buffer, "JPEG", quality=look.quality, subsampling=0, comment=comment if record else b"")
    else:
        exif = Image.Exif()
        if record:
            exif[DESCRIPTION] = f"{KEY} ".encode() + record
        image.save(buffer, "WEBP", quality=look.quality, method=4, exif=exif)
    return buffer.getvalue()


def _embedded(image: Image.Image) -> str | None:
    """Returns the record's JSON, None where there is none."""
    if image.format == "PNG":
        text = getattr(image, "text", {}).get(KEY)
        return None if text is None else str(text)
    found = image.info.get("comment") if image.format == "JPEG" else image.getexif().get(DESCRIPTION)
    if isinstance(found, str):
        found = found.encode("latin-1", "replace")  # EXIF knows no UTF-8: its reader takes bytes for Latin-1
    head = f"{KEY} ".encode()
    if not isinstance(found, bytes) or not found.startswith(head):
        return None
    return found.removeprefix(head).decode("utf-8", "replace")


def _marked(image: Image.Image, text: str) -> Image.Image:
    """Returns the picture with a line of text at the lower right, light on a dark shade."""
    size = max(8, image.height // 24)
    font = ImageFont.load_default(size)
    shade = Image.new("RGBA", image.size, (0, 0, 0, 0))
    draw = ImageDraw.Draw(shade)
    left, top, right, bottom = draw.textbbox((0, 0), text, font)
    x, y = image.width - (right - left) - size // 2 - left, image.height - (bottom - top) - size // 2 - top
    draw.text((x + 1, y + 1), text, (0, 0, 0, 150), font)
    draw.text((x, y), text, (255, 255, 255, 190), font)
    return Image.alpha_composite(image.convert("RGBA"), shade).convert("RGB")
