"""From bytes to what a batch holds: the decoders of fields, and the crop that makes pictures one size.

Decoding lies in `data.decoder` (pictures) and `data.fields` (captions, records), which need no torch. Use:
`image = Decoder()(data, "jpg", side=64)`; `pixels = ResizeCrop(64)(image)`.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.decoder import Decoder
from data.fields import BadSample, decode_caption, decode_json, image_size

__all__ = ["BadSample", "Decoder", "ResizeCrop", "decode_caption", "decode_json", "image_size"]


class ResizeCrop:
    """Makes a picture one size: resized, antialiased, until it covers the target, and the rest cropped.

    The target is by default a square of `resolution` pixels. With `random_crop` the draws place the crop,
    else it is central; with `flip` half of the pictures are mirrored.
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
        width, height = image.size
        size = target or (self.resolution, self.resolution)
        # The largest part of the picture that has the target's aspect.
        if width * size[1] <= height * size[0]:
            part = (float(width), width * size[1] / size[0])
        else:
            part = (height * size[0] / size[1], float(height))
        if not self.random_crop:
            x = y = 0.5
        left, top = (width - part[0]) * x, (height - part[1]) * y
        if image.size != size:
            # Rounding may have put the far edge a hair outside.
            box = (left, top, min(width, left + part[0]), min(height, top + part[1]))
            image = image.resize(size, Image.Resampling.BICUBIC, box, reducing_gap=2.0)
        pixels = np.asarray(image).transpose(2, 0, 1)
        if self.flip and mirror < 0.5:
            pixels = pixels[:, :, ::-1]
        if out is None:
            return torch.from_numpy(pixels.copy())
        out.numpy()[...] = pixels
        return out
