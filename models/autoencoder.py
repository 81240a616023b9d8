"""The variational autoencoder: images to latents of a few channels at a fraction of the size, and back.

Notable choices: the layout of Stable Diffusion's AutoencoderKL (Rombach et al. 2022, arXiv:2112.10752). It
may work on patches of pixels (a convolution at full resolution costs as much as one of four times the width
at a quarter of the side, and learns less) and on top of a linear map (which is learnt at once, so that the
layers have only to learn what it cannot do). The posterior is handed about as `moments` (mean and
log-variance), which shards can store and from which latents are drawn afresh each time. Latents outside this
file are always normalised per channel by `latent_mean` and `latent_std`, so that diffusion sees a deviation
near 1 whatever the autoencoder.

Used by the autoencoder stage (which trains it), by the diffusion stage and by sampling.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks import Downsample, ResidualBlock, SpatialSelfAttention, Upsample
from models.fused import GroupNorm
from models.winograd import Conv2d

NORM_EPS = 1e-6
LOG_VARIANCE_RANGE = (-30.0, 20.0)


class EncoderLevel(nn.Module):
    """The residual blocks at one resolution, and the halving after them unless it is the last level."""

    def __init__(self, in_channels: int, channels: int, blocks: int, norm_groups: int, last: bool) -> None:
        super().__init__()
        self.residuals = residual_blocks(in_channels, channels, blocks, norm_groups)
        self.downsample = None if last else Downsample(channels, asymmetric=True)

    def forward(self, x: Tensor) -> Tensor:
        """The feature map for the next level."""
        for residual in self.residuals:
            x = residual(x)
        return x if self.downsample is None else self.downsample(x)


class DecoderLevel(nn.Module):
    """The residual blocks at one resolution, and the doubling after them unless it is the last level."""

    def __init__(self, in_channels: int, channels: int, blocks: int, norm_groups: int, last: bool) -> None:
        super().__init__()
        self.residuals = residual_blocks(in_channels, channels, blocks, norm_groups)
        self.upsample = None if last else Upsample(channels)

    def forward(self, x: Tensor) -> Tensor:
        """The feature map for the next level."""
        for residual in self.residuals:
            x = residual(x)
        return x if self.upsample is None else self.upsample(x)


class Middle(nn.Module):
    """The blocks at the lowest resolution: residual, attention where wanted, residual."""

    def __init__(self, channels: int, norm_groups: int, attend: bool) -> None:
        super().__init__()
        self.residuals = residual_blocks(channels, channels, 2, norm_groups)
        self.attention = SpatialSelfAttention(channels, norm_groups) if attend else None

    def forward(self, x: Tensor) -> Tensor:
        """The feature map [B C h w]."""
        x = self.residuals[0](x)
        if self.attention is not None:
            x = self.attention(x)
        return self.residuals[1](x)


class Encoder(nn.Module):
    """Images [B 3 H W] -> features [B 2C h w], by way of patches of `patch_size` squared pixels.

    With `linear_path` a linear map of the pixels under each latent position is added to them.
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        blocks: int,
        out_channels: int,
        attend: bool,
        norm_groups: int,
        patch_size: int,
        linear_path: bool,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.factor = patch_size * 2 ** (len(channels) - 1)
        self.conv_in = Conv2d(3 * patch_size**2, channels[0], 3, padding=1)
        widths = [channels[0], *channels]
        self.down = nn.ModuleList(
            EncoderLevel(widths[i], widths[i + 1], blocks, norm_groups, last=i == len(channels) - 1)
            for i in range(len(channels))
        )
        self.middle = Middle(channels[-1], norm_groups, attend)
        self.norm_out = GroupNorm(norm_groups, channels[-1], eps=NORM_EPS)
        self.conv_out = Conv2d(channels[-1], out_channels, 3, padding=1)
        self.linear = nn.Conv2d(3 * self.factor**2, out_channels, 1) if linear_path else None

    def forward(self, images: Tensor) -> Tensor:
        """The features [B 2C h w]."""
        x = self.conv_in(F.pixel_unshuffle(images, self.patch_size))
        for level in self.down:
            x = level(x)
        x = self.conv_out(self.norm_out(self.middle(x), silu=True))
        return x if self.linear is None else x + self.linear(F.pixel_unshuffle(images, self.factor))


class Decoder(nn.Module):
    """Features [B C h w] -> images [B 3 H W]; one residual block a level more than the encoder.

    With `linear_path` a linear map of each position and its neighbours is added to the pixels.
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        blocks: int,
        in_channels: int,
        attend: bool,
        norm_groups: int,
        patch_size: int,
        linear_path: bool,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.factor = patch_size * 2 ** (len(channels) - 1)
        widths = [channels[-1], *reversed(channels)]
        self.conv_in = Conv2d(in_channels, channels[-1], 3, padding=1)
        self.middle = Middle(channels[-1], norm_groups, attend)
        self.up = nn.ModuleList(
            DecoderLevel(widths[i], widths[i + 1], blocks + 1, norm_groups, last=i == len(channels) - 1)
            for i in range(len(channels))
        )
        self.norm_out = GroupNorm(norm_groups, channels[0], eps=NORM_EPS)
        self.conv_out = Conv2d(channels[0], 3 * patch_size**2, 3, padding=1)
        self.linear = nn.Conv2d(in_channels, 3 * self.factor**2, 3, padding=1) if linear_path else None

    def forward(self, features: Tensor) -> Tensor:
        """The images [B 3 H W]."""
        x = self.middle(self.conv_in(features))
        for level in self.up:
            x = level(x)
        x = F.pixel_shuffle(self.conv_out(self.norm_out(x, silu=True)), self.patch_size)
        return x if self.linear is None else x + F.pixel_shuffle(self.linear(features), self.factor)


class Autoencoder(nn.Module):
    """A variational autoencoder with `factor` = `patch_size` * 2 ** (levels - 1); the defaults are those of
    Stable Diffusion.

    `channels` are the widths from the highest to the lowest resolution. With a `patch_size` p the highest is
    1/p of the pictures': p x p pixels become the channels of one position and come out of one (Shi et al.
    2016, arXiv:1609.05158). With `linear_path` a learnt linear map of the pixels is added to the moments and
    one of the latents to the pixels, beside all layers (after Chen et al. 2024, arXiv:2410.10733, whose maps
    are not learnt). Until `set_normalisation` is called the normalisation is the identity. Raises ValueError
    for channels that `norm_groups` does not divide and for a `patch_size` below 1.
    """

    def __init__(
        self,
        channels: tuple[int, ...] = (128, 256, 512, 512),
        blocks_per_level: int = 2,
        latent_channels: int = 4,
        mid_attention: bool = True,
        norm_groups: int = 32,
        patch_size: int = 1,
        linear_path: bool = False,
    ) -> None:
        super().__init__()
        if patch_size < 1:
            raise ValueError(f"patch_size is {patch_size}, but must be at least 1")
        if not channels or any(width % norm_groups != 0 for width in channels):
            raise ValueError(f"channels {tuple(channels)} must be multiples of norm_groups {norm_groups}")
        self.channels = tuple(channels)
        self.blocks_per_level = blocks_per_level
        self.latent_channels = latent_channels
        self.mid_attention = mid_attention
        self.norm_groups = norm_groups
        self.patch_size = patch_size
        self.linear_path = linear_path
        layout = (mid_attention, norm_groups, patch_size, linear_path)
        self.encoder = Encoder(self.channels, blocks_per_level, 2 * latent_channels, *layout)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.decoder = Decoder(self.channels, blocks_per_level, latent_channels, *layout)
        self.register_buffer("latent_mean", torch.zeros(1, latent_channels, 1, 1))
        self.register_buffer("latent_std", torch.ones(1, latent_channels, 1, 1))
        self.latent_mean: Tensor
        self.latent_std: Tensor

    @property
    def factor(self) -> int:
        """The pixels along one side of a latent position."""
        return self.patch_size * 2 ** (len(self.channels) - 1)

    def encode(self, images: Tensor) -> Tensor:
        """The posterior's moments [B 2C h w] of `images` [B 3 H W]: mean, then log-variance in [-30, 20].

        Raises ValueError for images whose height or width `factor` does not divide.
        """
        height, width = images.shape[2:]
        if height % self.factor != 0 or width % self.factor != 0:
            raise ValueError(
                f"images of {height}x{width}: each side must be a multiple of {self.factor}; crop or resize"
            )
        mean, log_variance = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return torch.cat([mean, log_variance.clamp(*LOG_VARIANCE_RANGE)], dim=1)

    def sample(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Normalised latents [B C h w] drawn from `moments` [B 2C h w] by `noise` [B C h w]."""
        mean, log_variance = moments.chunk(2, dim=1)
        return (mean + (0.5 * log_variance).exp() * noise - self.latent_mean) / self.latent_std

    def mode(self, moments: Tensor) -> Tensor:
        """Normalised latents [B C h w] at the posterior's mean."""
        return (moments.chunk(2, dim=1)[0] - self.latent_mean) / self.latent_std

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B 3 H W], about [-1, 1] but not clipped, from normalised `latents` [B C h w]."""
        return self.decoder(self.post_quant_conv(latents * self.latent_std + self.latent_mean))

    def kl(self, moments: Tensor) -> Tensor:
        """The divergence [B] of the posterior from a standard normal, in nats for each image."""
        mean, log_variance = moments.float().chunk(2, dim=1)
        return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=(1, 2, 3))

    @torch.no_grad()
    def set_normalisation(self, mean: Tensor, std: Tensor) -> None:
        """None; sets the per-channel `mean` [C] and deviation `std` [C] of the latents before normalisation.

        Raises ValueError for a deviation that is not positive and finite.
        """
        mean, std = mean.reshape(1, self.latent_channels, 1, 1), std.reshape(1, self.latent_channels, 1, 1)
        if not (torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 0).all()):
            raise ValueError(f"latent statistics mean {mean.tolist()}, std {std.tolist()} are not usable")
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)


def residual_blocks(in_channels: int, channels: int, count: int, norm_groups: int) -> nn.ModuleList:
    """`count` residual blocks without modulation, the first of which changes the width."""
    return nn.ModuleList(
        ResidualBlock(in_channels if i == 0 else channels, channels, norm_groups, NORM_EPS)
        for i in range(count)
    )
