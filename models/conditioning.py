"""What a network is told besides `x_t` and `c_noise`: text states, their mask, one pooled vector, a picture.

Notable choices: one frozen value passes through every network, so a batch of guidance branches, dropout of
the text and a move between devices are one call each. Unconditional means "told the empty caption": the null
conditioning is the text encoder's encoding of "", so an empty prompt is exactly the unconditional branch. A
picture that is not there is latents of zeros, the mean of all latents.

Used by text encoders (which make it), backbones (which read it), guidance and the diffusion stage.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Conditioning:
    """Text states `tokens` [B L D] float, `mask` [B L] bool (True where valid) and `pooled` [B D] float.

    `image` is the picture to be edited as latents [B C h w], zeros where a sample has none; None as a whole
    where the backbone takes no picture.
    """

    tokens: Tensor
    mask: Tensor
    pooled: Tensor
    image: Tensor | None = None

    @property
    def batch_size(self) -> int:
        """The number of samples B."""
        return self.tokens.shape[0]

    def replace(self, where: Tensor, null: "Conditioning") -> Self:
        """This conditioning with the samples where `where` [B] bool is True replaced by `null` (B = 1).

        With `where` drawn with probability p this is conditioning dropout (Ho and Salimans 2022,
        arXiv:2207.12598). A `null` without a picture has one of zeros. Raises ValueError when the two differ
        in length or width, or `null` alone has a picture.
        """
        if null.tokens.shape[1:] != self.tokens.shape[1:]:
            raise ValueError(
                f"null conditioning is {tuple(null.tokens.shape[1:])} [L D], conditioning "
                f"{tuple(self.tokens.shape[1:])}: encode the empty caption with the same text encoder"
            )
        if self.image is None and null.image is not None:
            raise ValueError(
                "null conditioning has a picture and conditioning has none: give both or neither"
            )
        image = self.image
        if image is not None:
            instead = torch.zeros_like(image[:1]) if null.image is None else null.image
            image = torch.where(where[:, None, None, None], instead, image)
        return replace(
            self,
            tokens=torch.where(where[:, None, None], null.tokens, self.tokens),
            mask=torch.where(where[:, None], null.mask, self.mask),
            pooled=torch.where(where[:, None], null.pooled, self.pooled),
            image=image,
        )

    def with_image(self, image: Tensor) -> Self:
        """This conditioning with the picture `image`, latents [B C h w]; ValueError for another B."""
        if image.shape[0] != self.batch_size:
            raise ValueError(f"{image.shape[0]} pictures for {self.batch_size} texts: give one for each")
        return replace(self, image=image)

    def expand(self, batch_size: int) -> Self:
        """This conditioning of one sample as a view of `batch_size` equal samples; RuntimeError if B > 1."""
        return replace(
            self,
            tokens=self.tokens.expand(batch_size, -1, -1),
            mask=self.mask.expand(batch_size, -1),
            pooled=self.pooled.expand(batch_size, -1),
            image=None if self.image is None else self.image.expand(batch_size, -1, -1, -1),
        )

    def split_last(self) -> tuple[Self, Self]:
        """All samples but the last one, and the last one alone (B = 1)."""
        return self.take(slice(None, -1)), self.take(slice(-1, None))

    def take(self, rows: Tensor | slice) -> Self:
        """Some samples of this conditioning: those at int64 numbers `rows` [N], or of a slice."""
        return replace(
            self,
            tokens=self.tokens[rows],
            mask=self.mask[rows],
            pooled=self.pooled[rows],
            image=None if self.image is None else self.image[rows],
        )

    def to(self, device: torch.device | str) -> Self:
        """This conditioning on `device`."""
        return replace(
            self,
            tokens=self.tokens.to(device),
            mask=self.mask.to(device),
            pooled=self.pooled.to(device),
            image=None if self.image is None else self.image.to(device),
        )

    @classmethod
    def cat(cls, parts: Sequence["Conditioning"]) -> Self:
        """The parts one after another along B, as guidance evaluates its K branches in one call [K*B ...].

        Raises ValueError where some have a picture and others none: which zeros those would be is theirs to
        say.
        """
        images = [part.image for part in parts if part.image is not None]
        if images and len(images) != len(parts):
            raise ValueError(
                f"{len(images)} of {len(parts)} parts have a picture: give all one, zeros where there is none"
            )
        return cls(
            tokens=torch.cat([part.tokens for part in parts]),
            mask=torch.cat([part.mask for part in parts]),
            pooled=torch.cat([part.pooled for part in parts]),
            image=torch.cat(images) if images else None,
        )
