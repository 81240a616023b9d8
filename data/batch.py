"""What one training step gets from the data, and the function that makes it of samples.

Pixels travel as bytes, a quarter of the traffic of floats, and become `images` on the device they are on.
Each sample keeps its global index: noise and times are drawn from it, so they do not depend on ranks or
workers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data.shards import Sample


@dataclass(frozen=True)
class Batch:
    """`pixels` uint8 [B 3 H W], `tokens` int64 [B L], `indices` int64 [B] (global), captions and keys B each.

    `substituted` counts the samples that stand for an unusable one.
    """

    pixels: Tensor
    tokens: Tensor
    indices: Tensor
    captions: list[str]
    keys: list[str]
    substituted: int = 0

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def images(self) -> Tensor:
        """RGB float32 [B 3 H W] in [-1, 1], on the batch's device."""
        return self.pixels.float().div_(127.5).sub_(1.0)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """Returns the batch with its tensors on `device`."""
        return replace(
            self,
            pixels=self.pixels.to(device, non_blocking=non_blocking),
            tokens=self.tokens.to(device, non_blocking=non_blocking),
            indices=self.indices.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> "Batch":
        """Returns the batch with its tensors in page-locked memory, which a device copies without waiting."""
        return replace(
            self,
            pixels=self.pixels.pin_memory(),
            tokens=self.tokens.pin_memory(),
            indices=self.indices.pin_memory(),
        )


class Collate:
    """Makes a Batch of samples; `tokenize` turns B captions into int64 [B L] and must be picklable."""

    def __init__(self, tokenize: Callable[[list[str]], Tensor]) -> None:
        self.tokenize = tokenize

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Returns the batch; raises ValueError where `tokenize` does not give int64 [B L]."""
        captions = [sample.caption for sample in samples]
        tokens = self.tokenize(captions)
        if tokens.dtype != torch.int64 or tokens.ndim != 2 or len(tokens) != len(samples):
            raise ValueError(
                f"{len(samples)} captions: tokenize gave {tokens.dtype} {list(tokens.shape)}, not int64 [B L]"
            )
        return Batch(
            pixels=torch.stack([sample.pixels for sample in samples]),
            tokens=tokens,
            indices=torch.tensor([sample.index for sample in samples], dtype=torch.int64),
            captions=captions,
            keys=[sample.key for sample in samples],
            substituted=sum(sample.substituted for sample in samples),
        )
