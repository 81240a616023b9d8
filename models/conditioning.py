"""What a network is told besides `x_t` and `c_noise`: text states, their mask and one pooled vector.

Notable choices: one frozen value passes through every network, so a batch of guidance branches, dropout of
the text and a move between devices are one call each. Unconditional means "told the empty caption": the null
conditioning is the text encoder's encoding of "", so an empty prompt is exactly the unconditional branch.

Used by text encoders (which make it), backbones (which read it), guidance and the diffusion stage.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Conditioning:
    """Text states `tokens` [B L D] float, `mask` [B L] bool (True where valid) and `pooled` [B D] float."""

    tokens: Tensor
    mask: Tensor
    pooled: Tensor

    @property
    def batch_size(self) -> int:
        """The number of samples B."""
        return self.tokens.shape[0]

    def replace(self, where: Tensor, null: "Conditioning") -> Self:
        """This conditioning with the samples where `where` [B] bool is True replaced by `null` (B = 1).

        With `where` drawn with probability p this is conditioning dropout (Ho and Salimans 2022,
        arXiv:2207.12598). Raises ValueError when the two differ in length or width.
        """
        if null.tokens.shape[1:] != self.tokens.shape[1:]:
            raise ValueError(
                f"null conditioning is {tuple(null.tokens.shape[1:])} [L D], conditioning "
                f"{tuple(self.tokens.shape[1:])}: encode the empty caption with the same text encoder"
            )
        return type(self)(
            tokens=torch.where(where[:, None, None], null.tokens, self.tokens),
            mask=torch.where(where[:, None], null.mask, self.mask),
            pooled=torch.where(where[:, None], null.pooled, self.pooled),
        )

    def expand(self, batch_size: int) -> Self:
        """This conditioning of one sample as a view of `batch_size` equal samples; RuntimeError if B > 1."""
        return type(self)(
            tokens=self.tokens.expand(batch_size, -1, -1),
            mask=self.mask.expand(batch_size, -1),
            pooled=self.pooled.expand(batch_size, -1),
        )

    def split_last(self) -> tuple[Self, Self]:
        """All samples but the last one, and the last one alone (B = 1)."""
        return (
            type(self)(self.tokens[:-1], self.mask[:-1], self.pooled[:-1]),
            type(self)(self.tokens[-1:], self.mask[-1:], self.pooled[-1:]),
        )

    def to(self, device: torch.device | str) -> Self:
        """This conditioning on `device`."""
        return type(self)(
            tokens=self.tokens.to(device), mask=self.mask.to(device), pooled=self.pooled.to(device)
        )

    @classmethod
    def cat(cls, parts: Sequence["Conditioning"]) -> Self:
        """The parts one after another along B, as guidance evaluates its K branches in one call [K*B ...]."""
        return cls(
            tokens=torch.cat([part.tokens for part in parts]),
            mask=torch.cat([part.mask for part in parts]),
            pooled=torch.cat([part.pooled for part in parts]),
        )
