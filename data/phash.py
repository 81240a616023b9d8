"""A perceptual hash of a picture: 64 bits of which a resized or recompressed copy changes few.

The picture is shrunk to 32x32 gray values, and of its cosine transform the 8x8 lowest frequencies but the
zeroth ones are compared with their median. Source: C. Zauner, "Implementation and benchmarking of perceptual
image hash functions" (2010), section 3.2.1. Mirrored, turned and cropped copies are not found. Use:
`near = (perceptual_hash(a) ^ perceptual_hash(b)).bit_count() <= 4`.
"""

import numpy as np
from PIL import Image

from data.decoder import Decoder

SIDE = 32
KEPT = 8
FLAT = 1.5  # gray levels of standard deviation below which a picture has no structure to compare

_DECODER = Decoder(min_side=1, max_aspect=1e9)
_BASIS = np.cos(np.pi / SIDE * np.outer(np.arange(1, KEPT + 1), np.arange(SIDE) + 0.5))


def perceptual_hash(data: bytes) -> int:
    """Returns the hash of an image's bytes, 0 where it is of one colour; raises BadSample if damaged."""
    image = _DECODER(data, side=SIDE).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    gray = np.asarray(image, np.float64)
    if gray.std() < FLAT:
        return 0
    frequencies = _BASIS @ (gray - gray.mean()) @ _BASIS.T
    bits = (frequencies > np.median(frequencies)).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big") or 1
