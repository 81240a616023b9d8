"""How far two small pictures are from each other, whatever their shift, orientation, tint and blur.

Everything is a sum of whole numbers and one division, so that a distance has the same last digit in any
batch and on any number of threads. Used by `evaluation.memorization`.

    pixel_distances(thumbnail, others).argmin()
"""

import torch
import torch.nn.functional as F
from torch import Tensor

#: Pixels that a copy may be shifted by in each direction: a sixteenth of the side of a thumbnail.
SHIFT = 2
#: Pairs that are compared at once; for memory alone.
_PAIRS = 512


def pixel_distances(one: Tensor, others: Tensor) -> Tensor:
    """Distances float64 `[K]` of a thumbnail uint8 `[3 S S]` to others `[K 3 S S]`: 0 same, 1 unrelated.

    All are blurred over 5 pixels, as a model's autoencoder blurs. The middle of the one, and of its mirror
    image, is laid on the others at shifts of up to `SHIFT` pixels in steps of a half: the least
    |a - b| / sqrt(|a|^2 + |b|^2), a and b without their means in each colour, so that a tint is no
    difference. Sums are of integers and exact.
    """
    both = torch.stack([one, one.flip(-1)])
    ways = torch.cat([_blurred(both, down, right) for down in (False, True) for right in (False, True)])
    side = ways.shape[-1] - 2 * SHIFT
    middles = ways[:, :, SHIFT : SHIFT + side, SHIFT : SHIFT + side]
    area, sums = side * side, middles.sum((2, 3))
    # All of these are `area` times a sum of squares about the means, and whole numbers far below 2^53.
    power = area * middles.square().sum((1, 2, 3)) - sums.square().sum(1)
    found = []
    for some in others.split(_PAIRS):
        theirs = _blurred(some)
        total, squares = _boxes(theirs, side), _boxes(theirs.square(), side)
        powers = power[:, None, None] + (area * squares - total.square()).sum(1, keepdim=True)
        products = area * _products(theirs, middles) - (sums[:, :, None, None] * total[:, None]).sum(2)
        ratio = (powers - 2 * products).clamp(min=0) / powers.clamp(min=1)
        found.append(ratio.amin((1, 2, 3)).sqrt())
    return torch.cat(found) if found else torch.empty(0, dtype=torch.float64)


def _blurred(pictures: Tensor, down: bool = False, right: bool = False) -> Tensor:
    """Sums over 5 x 5 pixels, float64 `[N 3 S-5 S-5]`, of `pictures`; half a pixel further down or right."""
    sums = _boxes(pictures.double(), 5)
    sums = sums[..., :-1, :] + (sums[..., 1:, :] if down else sums[..., :-1, :])
    return sums[..., :-1] + (sums[..., 1:] if right else sums[..., :-1])


def _boxes(values: Tensor, side: int) -> Tensor:
    """Sums over squares of `side` pixels, `[... S-side+1 S-side+1]`, of whole numbers `[... S S]`."""
    sums = F.pad(values.cumsum(-1).cumsum(-2), (1, 0, 1, 0))
    return (
        sums[..., side:, side:]
        - sums[..., :-side, side:]
        - sums[..., side:, :-side]
        + sums[..., :-side, :-side]
    )


def _products(values: Tensor, kernels: Tensor) -> Tensor:
    """The correlation `[K W h w]` of `values` `[K 3 S S]` with `kernels` `[W 3 s s]`.

    As `conv2d`, in half the time for double precision and kernels this large.
    """
    side, weights = kernels.shape[-1], kernels.flatten(1).T
    steps = values.shape[-1] - side + 1
    rows = [
        values[:, :, y : y + side, x : x + side].flatten(1) @ weights
        for y in range(steps)
        for x in range(steps)
    ]
    return torch.stack(rows, -1).unflatten(-1, (steps, steps))
