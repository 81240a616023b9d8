"""Masks and margins in pixels: what is painted, what stays to the bit, and how the two meet.

A mask is float32 `[B 1 H W]` in [0, 1], 1 where a picture is painted. Used by `models.pipeline` for painting
in pictures and around them; the mathematics on latents is `models.diffusion.editing`.
"""

import torch
from torch import Tensor
from torch.nn import functional


def soften(mask: Tensor, feather: int) -> Tensor:
    """`mask` with an edge that falls to 0 within `feather` pixels outside of it; 0 farther away, exactly."""
    if feather == 0:
        return mask
    grown = (feather + 1) // 2
    wide = functional.max_pool2d(mask, 2 * grown + 1, stride=1, padding=grown)
    near = feather // 2
    blurred = functional.avg_pool2d(functional.pad(wide, [near] * 4, "replicate"), 2 * near + 1, stride=1)
    # Summation may leave a trace of 1e-9 where nothing is, and 1 - 1e-7 where all is.
    return torch.where(blurred < 1e-5, 0.0, torch.maximum(mask, blurred)).clamp(max=1)


def to_latents(mask: Tensor, factor: int) -> Tensor:
    """The mask `[B 1 H/factor W/factor]` of latents: the largest value of the pixels each one stands for."""
    return functional.max_pool2d(mask, factor)


def composite(painted: Tensor, known: Tensor, mask: Tensor) -> Tensor:
    """Pictures uint8 `[B 3 H W]`: `known` to the bit where the mask is 0, `painted` where it is 1."""
    mixed = (mask * painted.float() + (1 - mask) * known.float()).round().to(torch.uint8)
    return torch.where(mask == 0, known, torch.where(mask == 1, painted, mixed))


def extended(image: Tensor, left: int, top: int, right: int, bottom: int) -> tuple[Tensor, Tensor]:
    """A larger canvas around `image` uint8 `[3 H W]`: the picture, its edges repeated, and a mask `[H W]`.

    Raises:
        ValueError: a margin is negative.
    """
    margins = {"left": left, "top": top, "right": right, "bottom": bottom}
    for side, pixels in margins.items():
        if pixels < 0:
            raise ValueError(f"extend: {side} is {pixels} pixels, but must not be negative")
    around = (left, right, top, bottom)
    canvas = functional.pad(image[None].float(), around, "replicate")[0].to(torch.uint8)
    mask = functional.pad(torch.zeros(image.shape[1:]), around, value=1.0)
    return canvas, mask
