"""From bytes to what a batch holds: the decoders of fields, and the crop that makes pictures one size.

Decoding lies in `data.decoder` (pictures) and `data.fields` (captions, records), which need no torch. Use:
`image = Decoder()(data, "jpg", side=64)`; `pixels = ResizeCrop(64)(image)`.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from data.decoder import Decoder
from data.fields import BadSample, decode_caption, decode_json, image_size

__all__ = ["BadSample", "Decoder", "ResizeCrop", "decode_caption", "decode_json", "image_size"]


class ResizeCrop:
    """Makes a picture one size: a part of its shape cut out, in whole pixels, and resized, antialiased.

    The size is by default a square of `resolution` pixels, the part as large as the picture allows. With
    `random_crop` the draws place the part, else it is central; with `flip` half of the pictures are mirrored.
    Pixels are those of Pillow's bicubic resize of the part, by torch, which takes a fifth of the time.
    """

    def __init__(self, resolution: int, random_crop: bool = False, flip: bool = False) -> None:
        if resolution < 1:
            raise ValueError(f"resolution={resolution}; it must be at least 1 pixel")
        self.resolution = resolution
        self.random_crop = random_crop
        self.flip = flip

    def __call__(
        self,
        image: Image.Image,
        x: float = 0.5,
        y: float = 0.5,
        mirror: float = 1.0,
        target: tuple[int, int] | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Returns uint8 [3 H W] of an RGB picture and three draws in [0, 1), written to `out` where given.

        `target` is (W, H) in pixels.
        """
        size = target or (self.resolution, self.resolution)
        width, height = _part(image.size, size)
        if not self.random_crop:
            x = y = 0.5
        left, top = _start(image.width - width, x), _start(image.height - height, y)
        # A copy, as torch takes only what may be written to, and resizes fast only what lies together.
        part = np.asarray(image)[top : top + height, left : left + width].copy()
        pixels = torch.from_numpy(part).permute(2, 0, 1)
        if (width, height) != size:
            wanted = (size[1], size[0])
            pixels = functional.interpolate(pixels[None], wanted, mode="bicubic", antialias=True)[0]
        if self.flip and mirror < 0.5:
            pixels = pixels.flip(2)
        return pixels.contiguous() if out is None else out.copy_(pixels)


def _part(picture: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Returns (width, height) of the largest part of a picture that has the shape of `size`."""
    width, height = picture
    if width * size[1] <= height * size[0]:
        return width, max(1, round(width * size[1] / size[0]))
    return max(1, round(height * size[0] / size[1])), height


def _start(room: int, draw: float) -> int:
    """Returns which of the room + 1 places a draw in [0, 1) means."""
    return min(room, int((room + 1) * draw))
