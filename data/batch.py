"""What one training step gets from the data, and the function that makes it of samples.

Pixels travel as bytes, a quarter of the traffic of floats, and become `images` on the device they are on.
Each sample keeps its global index: noise and times are drawn from it, so they do not depend on ranks or
workers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data.shards import Rows, Sample


@dataclass(frozen=True)
class Batch:
    """`pixels` uint8 [B 3 H W], `tokens` int64 [B L], `indices` int64 [B] (global), captions and keys B each.

    `substituted` counts the samples that stand for an unusable one, `truncated` the captions that were too
    long for the text encoder. From precomputed shards come `moments`,
    float [B 2C h w], and `pixels` are then empty, [B 0]; perhaps also `text`, the encoded captions as (tokens
    [B L D], mask bool [B L], pooled [B D]), and then `tokens` are empty, [B 0]: a row that masks all is "".
    Of pairs, `before` uint8 [B 3 H W] are the pictures that the captions tell how to edit into `pixels`.
    """

    pixels: Tensor
    tokens: Tensor
    indices: Tensor
    captions: list[str]
    keys: list[str]
    substituted: int = 0
    moments: Tensor | None = None
    text: tuple[Tensor, Tensor, Tensor] | None = None
    truncated: int = 0
    before: Tensor | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def images(self) -> Tensor:
        """RGB float32 [B 3 H W] in [-1, 1], on the batch's device; ValueError for a batch of moments."""
        if self.moments is not None:
            raise ValueError("a batch of precomputed moments has no images; read the pictures' own shards")
        return self.pixels.float().div_(127.5).sub_(1.0)

    @property
    def images_before(self) -> Tensor:
        """The pictures before as `images`; ValueError for a batch that has none."""
        if self.before is None:
            raise ValueError("a batch without pictures before their edits; name their field in data.before")
        return self.before.float().div_(127.5).sub_(1.0)

    def to(self, device: torch.device | str) -> "Batch":
        """Returns the batch with its tensors on `device`; copies of page-locked memory are not waited for."""
        to_host = torch.device(device).type == "cpu"  # whose tensors are read without asking the device
        return self._moved(lambda tensor: tensor.to(device, non_blocking=not to_host))

    def pin_memory(self) -> "Batch":
        """Returns the batch with its tensors in page-locked memory, which a device copies without waiting."""
        return self._moved(lambda tensor: tensor.pin_memory())

    def parts(self, count: int) -> "list[Batch]":
        """Returns the batch in `count` equal parts, of views; what is counted stays with the whole.

        Raises ValueError where it does not divide.
        """
        size, rest = divmod(len(self), count)
        if rest:
            raise ValueError(f"a batch of {len(self)} samples does not divide by {count}")
        return [self] if count == 1 else [self._part(k * size, (k + 1) * size) for k in range(count)]

    def _part(self, first: int, last: int) -> "Batch":
        text = self.text
        return Batch(
            pixels=self.pixels[first:last],
            tokens=self.tokens[first:last],
            indices=self.indices[first:last],
            captions=self.captions[first:last],
            keys=self.keys[first:last],
            moments=None if self.moments is None else self.moments[first:last],
            before=None if self.before is None else self.before[first:last],
            text=None if text is None else (text[0][first:last], text[1][first:last], text[2][first:last]),
        )

    def _moved(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        text = self.text
        return replace(
            self,
            pixels=move(self.pixels),
            tokens=move(self.tokens),
            indices=move(self.indices),
            moments=None if self.moments is None else move(self.moments),
            before=None if self.before is None else move(self.before),
            text=None if text is None else (move(text[0]), move(text[1]), move(text[2])),
        )


class Collate:
    """Makes a Batch of samples; `tokenize` turns B captions into int64 [B L] and must be picklable.

    `dropped` says how many tokens of each caption find no room; None counts no captions as truncated.
    """

    def __init__(
        self,
        tokenize: Callable[[list[str]], Tensor],
        dropped: Callable[[list[str]], list[int]] | None = None,
    ) -> None:
        self.tokenize = tokenize
        self.dropped = dropped

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Returns the batch; raises ValueError where `tokenize` does not give int64 [B L]."""
        captions = [sample.caption for sample in samples]
        tokens = self.tokenize(captions)
        if tokens.dtype != torch.int64 or tokens.ndim != 2 or len(tokens) != len(samples):
            raise ValueError(
                f"{len(samples)} captions: tokenize gave {tokens.dtype} {list(tokens.shape)}, not int64 [B L]"
            )
        before = [sample.before for sample in samples if sample.before is not None]
        if isinstance(samples, Rows):
            pixels = samples.pixels
        else:
            pixels = torch.stack([sample.pixels for sample in samples])
        return Batch(
            pixels=pixels,
            tokens=tokens,
            indices=torch.tensor([sample.index for sample in samples], dtype=torch.int64),
            captions=captions,
            keys=[sample.key for sample in samples],
            substituted=sum(sample.substituted for sample in samples),
            truncated=self._truncated(captions, tokens),
            before=torch.stack(before) if len(before) == len(samples) > 0 else None,
        )

    def _truncated(self, captions: list[str], tokens: Tensor) -> int:
        """Returns how many captions were cut; only those whose row has no padding are looked at."""
        if self.dropped is None or not captions:
            return 0
        # Padding repeats the end token, so the last two of a row that is not full are the same.
        padded = (tokens[:, -1] == tokens[:, -2]).tolist()
        full = [caption for caption, short in zip(captions, padded, strict=True) if not short]
        return sum(count > 0 for count in self.dropped(full)) if full else 0
