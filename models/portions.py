"""Networks called on portions of a fixed number of rows, so that no row depends on how many come with it.

Matrix and convolution kernels are chosen by the shape of the batch, and sum in another order for another
shape: the same row then differs in its last bits, and now and then by a level in a picture. On a CPU every
call is therefore made with one fixed number of rows, the last ones repeated where there are fewer; within a
call of one shape the place of a row changes nothing. The number depends on the size of a row's content alone.
Used by `models.pipeline`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from models.conditioning import Conditioning

#: Positions of latents, or pixels of a picture, that fill two cores; more at once is not faster.
POSITIONS = 2_048
PIXELS = 16_384
TEXTS = 8


def rows_for(limit: int, height: int, width: int) -> int:
    """How many rows of `height * width` a portion has."""
    return max(1, limit // (height * width))


def in_portions(rows: int, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`function(*inputs)` `[B ...]`, called on `rows` rows at a time; `inputs` are `[B ...]` each."""
    count = len(inputs[0])
    done = []
    for start in range(0, count, rows):
        parts = [_filled(each[start : start + rows], rows) for each in inputs]
        done.append(function(*parts)[: count - start])
    return torch.cat(done)


def _filled(part: Tensor, rows: int) -> Tensor:
    """A copy of `part` with its last row repeated to `rows`, always laid out in the same way."""
    whole = part.new_empty((rows, *part.shape[1:]))
    whole[: len(part)] = part
    whole[len(part) :] = part[-1:]
    return whole


class PortionedBackbone:
    """A backbone that is called on portions.

    Args:
        backbone: `[B C h w], [B], Conditioning -> [B C h w]`.
    """

    def __init__(self, backbone: Callable[[Tensor, Tensor, Conditioning], Tensor]) -> None:
        self.backbone = backbone

    def __call__(self, x: Tensor, c_noise: Tensor, conditioning: Conditioning) -> Tensor:
        """The output `[B C h w]`."""
        picture = () if conditioning.image is None else (conditioning.image,)

        def call(x: Tensor, c_noise: Tensor, *parts: Tensor) -> Tensor:
            return self.backbone(x, c_noise, Conditioning(*parts))

        given = (conditioning.tokens, conditioning.mask, conditioning.pooled, *picture)
        return in_portions(rows_for(POSITIONS, *x.shape[2:]), call, x, c_noise, *given)
