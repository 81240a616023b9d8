"""Pictures that tell nothing but what they show: one size, one encoder, no metadata, no telling length.

Every picture of an arena, made here or elsewhere, is decoded, brought to the arena's size and encoded anew
by the same PNG encoder when it is added (`blind_png`). The length of a PNG still depends on its pixels, and
a smooth model's pictures are shorter; so the two pictures of a pair are padded to one length (`pad_alike`).
What remains is what a voter may see: the pixels.
"""

import io
import struct
import zlib

import numpy as np
from PIL import Image
from torch import Tensor

SIGNATURE = b"\x89PNG\r\n\x1a\n"
#: A chunk that no decoder needs to know: ancillary, private, safe to copy (PNG 1.2, section 3.3).
PADDING = b"paDt"
END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
#: Lengths are rounded up to a multiple of so many bytes.
STEP = 4_096


def blind_png(pixels: Tensor) -> bytes:
    """Returns the PNG of a picture uint8 `[3 H W]`: header, pixels, end."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())).save(buffer, "PNG")
    return buffer.getvalue()


def pad_alike(one: bytes, other: bytes) -> tuple[bytes, bytes]:
    """Returns two PNGs of `blind_png` padded to the same length, a multiple of `STEP`."""
    longest = max(len(one), len(other)) + 12  # a chunk has twelve bytes besides its data
    length = -(-longest // STEP) * STEP
    return _padded(one, length), _padded(other, length)


def chunks_of(png: bytes) -> list[bytes]:
    """Returns the names of a PNG's chunks in order; raises ValueError for what is no whole PNG."""
    if not png.startswith(SIGNATURE):
        raise ValueError("it is no PNG")
    names, at = [], len(SIGNATURE)
    while at + 12 <= len(png):
        (length,) = struct.unpack_from(">I", png, at)
        names.append(png[at + 4 : at + 8])
        at += 12 + length
    if at != len(png):
        raise ValueError("it is cut")
    return names


def _padded(png: bytes, length: int) -> bytes:
    if not png.endswith(END):
        raise ValueError("it is no PNG of blind_png")
    data = PADDING + bytes(length - len(png) - 12)
    chunk = struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    return png[: -len(END)] + chunk + END
