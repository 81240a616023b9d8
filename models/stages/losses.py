"""The autoencoder's loss: distances of pixels at full and half size, plus the KL term of its latents."""

import math
from enum import Enum

import torch
from torch import Tensor
from torch.nn import functional as F


class Distance(Enum):
    """Distance between two pictures: mean absolute or mean squared difference of their values in [-1, 1]."""

    l1 = "l1"
    l2 = "l2"


class ReconstructionLoss:
    """`distance(decoded, images) + kl_weight * kl`, one number a sample; and a second distance at half size.

    Args:
        distance: between the pictures.
        kl_weight: on the divergence in nats a latent value; small, as it only keeps the latents bounded
            (Rombach et al. 2022, arXiv 2112.10752, section G).
        half_size_weight: on the distance between the pictures at half size and what their latents, made half
            as large, are decoded to. Latents that bear this are smooth like pictures, and easier to learn
            for diffusion (Kouzelis et al. 2025, arXiv 2502.09509: its implicit form, the scale 1/2 alone).

    Raises:
        ValueError: a weight that is negative or not finite.
    """

    def __init__(
        self, distance: Distance = Distance.l2, kl_weight: float = 1e-5, half_size_weight: float = 0.0
    ) -> None:
        for name, weight in {"kl_weight": kl_weight, "half_size_weight": half_size_weight}.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"{name} is {weight}, but must be a number that is not negative")
        self.distance = distance
        self.kl_weight = kl_weight
        self.half_size_weight = half_size_weight

    def __call__(self, decoded: Tensor, images: Tensor, kl: Tensor, latent_values: int) -> Tensor:
        """Loss float32 `[B]` for pictures `[B 3 H W]` and `kl` `[B]` in nats over `latent_values` values."""
        return self._distances(decoded, images) + self.kl_weight * kl / latent_values

    def at_half_size(self, decoded: Tensor, images: Tensor) -> Tensor:
        """What is added to the loss, float32 `[B]`, for what latents made `half` as large are decoded to.

        Args:
            decoded: of those, `[B 3 h w]`.
            images: at their full size `[B 3 H W]`; rows and columns beyond 2h and 2w are not compared.
        """
        h, w = decoded.shape[2:]
        return self.half_size_weight * self._distances(decoded, half(images)[:, :, :h, :w])

    def _distances(self, decoded: Tensor, images: Tensor) -> Tensor:
        error = decoded.float() - images
        return (error.abs() if self.distance is Distance.l1 else error.square()).flatten(1).mean(1)


def half(x: Tensor) -> Tensor:
    """Means of 2x2 values of pictures or latents: `[B C H W]` to `[B C H/2 W/2]`, rounded down."""
    return F.avg_pool2d(x, 2)


def psnr_db(decoded: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, float32 `[B]`, of pictures `[B 3 H W]` in [-1, 1] after clipping."""
    error = (decoded.float().clamp(-1, 1) - images).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp(min=1e-10))
