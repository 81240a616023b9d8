"""A small decoder from latents to pictures, for where decoding is a large share of making one.

Notable choices: all convolutions work on the grid of the latents, and one shuffle of channels to pixels
(Shi et al. 2016, arXiv:1609.05158) takes the last of them to full size; no norms. An autoencoder's own
decoder does most of its work at full size. It learns to decode as that does, so latents keep their meaning.

Trained by the distillation stage, used by sampling.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks import zero_init


class TinyDecoder(nn.Module):
    """A network from normalised latents [B C h w] to images [B 3 H W], about [-1, 1] but not clipped.

    `latent_channels` C and `factor` H/h are the autoencoder's; `width` channels, `blocks` residual blocks.
    Raises ValueError for numbers below 1.
    """

    def __init__(self, latent_channels: int, factor: int, width: int = 64, blocks: int = 3) -> None:
        super().__init__()
        if width < 1 or blocks < 1:
            raise ValueError(f"width is {width} and blocks {blocks}, but both must be at least 1")
        self.factor = factor
        self.conv_in = nn.Conv2d(latent_channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(TinyBlock(width) for _ in range(blocks))
        self.conv_out = nn.Conv2d(width, 3 * factor**2, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """The images [B 3 H W] of `latents` [B C h w]."""
        x = self.conv_in(latents)
        for block in self.blocks:
            x = block(x)
        return F.pixel_shuffle(self.conv_out(torch.relu(x)), self.factor)


class TinyBlock(nn.Module):
    """Two 3x3 convolutions, each behind a ReLU, around a shortcut: [B C h w]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(width, width, 3, padding=1)
        self.conv_out = zero_init(nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """The feature map [B C h w]."""
        return x + self.conv_out(torch.relu(self.conv_in(torch.relu(x))))
