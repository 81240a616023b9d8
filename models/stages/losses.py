"""The autoencoder's loss: distance of the pixels plus the KL term of its latents."""

import math
from enum import Enum

import torch
from torch import Tensor


class Distance(Enum):
    """Distance between two pictures: mean absolute or mean squared difference of their values in [-1, 1]."""

    l1 = "l1"
    l2 = "l2"


class ReconstructionLoss:
    """`distance(decoded, images) + kl_weight * kl`, one number a sample.

    Args:
        distance: between the pictures.
        kl_weight: on the divergence in nats a latent value; small, as it only keeps the latents bounded
            (Rombach et al. 2022, arXiv 2112.10752, section G).
    """

    def __init__(self, distance: Distance = Distance.l2, kl_weight: float = 1e-5) -> None:
        if not (math.isfinite(kl_weight) and kl_weight >= 0):
            raise ValueError(f"kl_weight is {kl_weight}, but must be a number that is not negative")
        self.distance = distance
        self.kl_weight = kl_weight

    def __call__(self, decoded: Tensor, images: Tensor, kl: Tensor, latent_values: int) -> Tensor:
        """Loss float32 `[B]` for pictures `[B 3 H W]` and `kl` `[B]` in nats over `latent_values` values."""
        error = decoded.float() - images
        distances = error.abs() if self.distance is Distance.l1 else error.square()
        return distances.flatten(1).mean(1) + self.kl_weight * kl / latent_values


def psnr_db(decoded: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, float32 `[B]`, of pictures `[B 3 H W]` in [-1, 1] after clipping."""
    error = (decoded.float().clamp(-1, 1) - images).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp(min=1e-10))
