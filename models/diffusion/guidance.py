"""Guidance: a weighted sum of denoiser branches whose weights sum to 1.

All branches go through the backbone in one batched call. A branch of weight 0 is never computed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.conditioning import Conditioning
from models.diffusion.denoiser import Denoiser

#: What a sampler calls: `(x_t [B C h w], t [B]) -> x0_hat [B C h w]`.
Denoise = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Branch:
    """One denoiser call: its conditioning (batch B) and its weight in the sum."""

    weight: float
    conditioning: Conditioning


def guide(denoiser: Denoiser, branches: list[Branch]) -> Denoise:
    """A `(x_t, t) -> x0_hat` that sums the branches.

    Raises:
        ValueError: the weights do not sum to 1 (the sum would no longer be an image).
    """
    total = math.fsum(branch.weight for branch in branches)
    if not abs(total - 1) < 1e-6:
        raise ValueError(f"guidance weights sum to {total}, but must sum to 1")
    used = [branch for branch in branches if branch.weight != 0]
    conditioning = Conditioning.cat([branch.conditioning for branch in used])
    weights = [branch.weight for branch in used]

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        K = len(weights)
        outputs = denoiser(x_t.repeat(K, 1, 1, 1), t.repeat(K), conditioning).chunk(K)
        return torch.stack([w * x0 for w, x0 in zip(weights, outputs, strict=True)]).sum(0)

    return denoise


def classifier_free(
    denoiser: Denoiser, conditioning: Conditioning, null_conditioning: Conditioning, guidance_scale: float
) -> Denoise:
    """Classifier-free guidance, `uncond + s * (cond - uncond)` (Ho and Salimans 2022, arXiv 2207.12598).

    `guidance_scale` 1 is the conditional branch alone and 0 the unconditional one; each costs one branch.
    """
    return guide(
        denoiser,
        [Branch(1 - guidance_scale, null_conditioning), Branch(guidance_scale, conditioning)],
    )
