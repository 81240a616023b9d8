"""Every random number of training and sampling, as a pure function of `(seed, index, purpose)`.

A counter-based generator (Philox 4x32-10, Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3")
written in integer tensor operations: sample 1,000,000 gets its noise without the 999,999 before it, on any
device, for any batch size, number of ranks or workers, and there is no generator state to save.
"""

import math
from enum import IntEnum

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_ROUNDS = 10
_PARTS = 2**24
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_GOLDEN = (math.sqrt(5) - 1) / 2


class Purpose(IntEnum):
    """What a number is for; numbers for two purposes are independent."""

    TIME = 1
    NOISE = 2
    POSTERIOR = 3
    CONDITIONING_DROPOUT = 4
    INITIAL_NOISE = 5
    STEP_NOISE = 6
    VARIATION_NOISE = 7


def _multiply(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of `factor * x` for 32-bit values kept in int64."""
    upper, lower = factor >> 16, factor & 0xFFFF
    high = (upper * x + ((lower * x) >> 16)) >> 16
    return high, (factor * x) & _MASK


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four int64 tensors of 32 random bits each, shaped as the four counters broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


class Draws:
    """The random numbers that belong to the samples `indices`.

    Args:
        seed: of the run; any integer, 0 included.
        indices: global sample (or image) indices, int64 `[B]`; numbers come out on its device.
    """

    def __init__(self, seed: int, indices: Tensor) -> None:
        self.seed = seed
        self.indices = indices.long()

    def _bits(self, purpose: Purpose, blocks: int, part: int = 0) -> tuple[Tensor, ...]:
        if not 0 <= part < _PARTS:
            raise ValueError(f"part is {part}, but must be at least 0 and below {_PARTS}: number them from 0")
        index = self.indices[:, None]
        block = torch.arange(blocks, device=index.device)[None, :]
        # Purposes stay below 2**8, so that no part of one meets a part of another.
        last = torch.full_like(block, int(purpose) + (part << 8))
        counter = (index & _MASK, (index >> 32) & _MASK, block, last)
        return philox(counter, (self.seed & _MASK, (self.seed >> 32) & _MASK))

    def uniform(self, purpose: Purpose) -> Tensor:
        """One number in [0, 1) a sample, float32 `[B]`."""
        return (self._bits(purpose, 1)[0][:, 0] >> 8).float() / 2**24

    def spread(self, purpose: Purpose) -> Tensor:
        """One number in (0, 1) a sample, float32 `[B]`, evenly spread over any run of consecutive indices.

        The golden-ratio sequence with a random start. Used for `t`, where even coverage in each batch lowers
        the variance of the loss (Kingma et al. 2021, arXiv 2107.00630, appendix I.1).
        """
        # A tensor of the CPU that has no dimensions goes with any device.
        start = Draws(self.seed, torch.zeros(1, dtype=torch.long)).uniform(purpose).double()[0]
        place = torch.remainder(start + self.indices.double() * _GOLDEN, 1.0)
        return place.float().clamp(2**-24, 1 - 2**-24)

    def normal(self, purpose: Purpose, shape: torch.Size | tuple[int, ...], part: int = 0) -> Tensor:
        """Standard normal numbers, float32 `[B, *shape]` (Box and Muller 1958).

        Args:
            purpose: what they are for.
            shape: of one sample.
            part: which of a purpose's many independent draws, such as the step of a sampler; below 2**24.
        """
        count = math.prod(shape)
        blocks = -(-count // 4)
        b0, b1, b2, b3 = self._bits(purpose, blocks, part)
        radius = torch.stack((b0, b2), -1).add_(1).float().div_(2**32).clamp_(max=1).log_().mul_(-2).sqrt_()
        angle = torch.stack((b1, b3), -1).float().mul_(2 * math.pi / 2**32)
        pairs = torch.stack((radius * angle.cos(), radius * angle.sin()), -1)
        return pairs.reshape(len(self.indices), -1)[:, :count].reshape(-1, *shape)
