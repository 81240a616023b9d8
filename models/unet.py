"""The convolutional backbone `F(x, c_noise, conditioning)`: a UNet with cross-attention to the text.

Notable choices: the layout of Stable Diffusion (Rombach et al. 2022, arXiv:2112.10752) from 3 M parameters
to the 866 M of Stable Diffusion 2, with three switches that diffusers knows too (scale and shift modulation,
pooled text added to the noise level, norm groups) and two of our own (a learned position map, a picture to be
edited beside `x`). A zero-initialised output convolution makes a fresh network predict 0 everywhere.

Used as the backbone of a denoiser; knows nothing of schedules or losses.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks import (
    Downsample,
    EmbeddingMLP,
    ResidualBlock,
    SpatialTransformer,
    Upsample,
    noise_embedding,
    zero_init,
)
from models.conditioning import Conditioning
from models.fused import GroupNorm

NORM_EPS = 1e-5
#: So wide that texts differ at once in what they make of a place, by as much as the map itself: a product of
#: two small factors has hardly a gradient, and "on the left" was learnt last of all. docs/decisions/0017.
POSITION_GAIN_STD = 0.5


@dataclass(frozen=True)
class BlockPlan:
    """What all blocks of one UNet share, and how to build one of each kind from it."""

    time_width: int
    context_width: int
    head_dim: int
    norm_groups: int
    scale_shift: bool

    def residual(self, in_channels: int, out_channels: int) -> ResidualBlock:
        """A residual block modulated by the noise level."""
        return ResidualBlock(
            in_channels, out_channels, self.norm_groups, NORM_EPS, self.time_width, self.scale_shift
        )

    def transformers(self, count: int, channels: int, depth: int) -> nn.ModuleList:
        """`count` spatial transformers of `depth` blocks each; none where `depth` is 0."""
        heads = channels // self.head_dim
        return nn.ModuleList(
            SpatialTransformer(channels, heads, self.context_width, depth, self.norm_groups)
            for _ in range(count if depth > 0 else 0)
        )


class DownLevel(nn.Module):
    """The blocks at one resolution on the way down, and the halving after them if not last."""

    def __init__(
        self, plan: BlockPlan, in_channels: int, channels: int, blocks: int, depth: int, last: bool
    ) -> None:
        super().__init__()
        self.residuals = nn.ModuleList(
            plan.residual(in_channels if i == 0 else channels, channels) for i in range(blocks)
        )
        self.transformers = plan.transformers(blocks, channels, depth)
        self.downsample = None if last else Downsample(channels)

    def forward(self, x: Tensor, time: Tensor, context: Tensor, mask: Tensor) -> list[Tensor]:
        """Every feature map made at this level, in order; the last one is the input of the next level."""
        maps = []
        for i, residual in enumerate(self.residuals):
            x = residual(x, time)
            if len(self.transformers) > 0:
                x = self.transformers[i](x, context, mask)
            maps.append(x)
        if self.downsample is not None:
            maps.append(self.downsample(x))
        return maps


class MiddleLevel(nn.Module):
    """The blocks at the lowest resolution: residual, attention, residual; at depth 0 one residual."""

    def __init__(self, plan: BlockPlan, channels: int, depth: int) -> None:
        super().__init__()
        self.residuals = nn.ModuleList(
            plan.residual(channels, channels) for _ in range(2 if depth > 0 else 1)
        )
        self.transformers = plan.transformers(1, channels, depth)

    def forward(self, x: Tensor, time: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """The feature map [B C h w]."""
        x = self.residuals[0](x, time)
        for transformer, residual in zip(self.transformers, self.residuals[1:], strict=True):
            x = residual(transformer(x, context, mask), time)
        return x


class UpLevel(nn.Module):
    """The blocks at one resolution on the way up, one for each skip, and the doubling after them."""

    def __init__(
        self,
        plan: BlockPlan,
        in_channels: int,
        skip_channels: list[int],
        channels: int,
        depth: int,
        last: bool,
    ) -> None:
        super().__init__()
        self.residuals = nn.ModuleList(
            plan.residual((in_channels if i == 0 else channels) + skip, channels)
            for i, skip in enumerate(skip_channels)
        )
        self.transformers = plan.transformers(len(skip_channels), channels, depth)
        self.upsample = None if last else Upsample(channels)

    def forward(self, x: Tensor, skips: list[Tensor], time: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """The feature map [B C 2h 2w]; `skips` are in the order in which they are used."""
        for i, residual in enumerate(self.residuals):
            x = residual(torch.cat([x, skips[i]], dim=1), time)
            if len(self.transformers) > 0:
                x = self.transformers[i](x, context, mask)
        return x if self.upsample is None else self.upsample(x)


class UNet(nn.Module):
    """A network `(x [B C h w], c_noise [B], conditioning) -> [B C h w]`.

    `channels` are the widths from the highest to the lowest resolution, `transformer_depth` the transformer
    blocks after each residual block of that level (0: no attention there). The middle attends when any level
    does. `scale_shift` modulates by scale and shift instead of shift alone. `pooled_conditioning` adds the
    pooled text to the noise-level embedding. `position_size` s > 0 adds a learned map [1 C0 s s], scaled by
    that embedding, to the first feature map, resized bilinearly for latents of another size. With
    `patch_size` p the network works on patches of p x p latents, p*p times the channels on a grid of 1/p
    the side (Dosovitskiy et al. 2020, arXiv:2010.11929), at 1/p^2 of the cost. `image_conditioning` puts the
    picture that the conditioning holds beside `x`, 2C channels in all (InstructPix2Pix, Brooks et al. 2023,
    arXiv:2211.09800, section 3.2); of a conditioning without one it sees zeros. The defaults are Stable
    Diffusion 2 (with `conditioning_dim=1024`). Raises ValueError for settings that do not divide.
    """

    def __init__(
        self,
        latent_channels: int,
        conditioning_dim: int,
        channels: tuple[int, ...] = (320, 640, 1280, 1280),
        blocks_per_level: int = 2,
        transformer_depth: tuple[int, ...] = (1, 1, 1, 0),
        head_dim: int = 64,
        scale_shift: bool = False,
        pooled_conditioning: bool = False,
        position_size: int = 0,
        patch_size: int = 1,
        norm_groups: int = 32,
        image_conditioning: bool = False,
    ) -> None:
        super().__init__()
        if patch_size < 1:
            raise ValueError(f"patch_size is {patch_size}, but must be at least 1")
        check_shape(channels, blocks_per_level, transformer_depth, head_dim, norm_groups)
        self.latent_channels = latent_channels
        self.conditioning_dim = conditioning_dim
        self.channels = tuple(channels)
        self.blocks_per_level = blocks_per_level
        self.transformer_depth = tuple(transformer_depth)
        self.head_dim = head_dim
        self.scale_shift = scale_shift
        self.norm_groups = norm_groups
        self.patch_size = patch_size
        self.image_conditioning = image_conditioning
        patch_channels = latent_channels * patch_size**2

        time_width = 4 * channels[0]
        self.time_embedding = EmbeddingMLP(channels[0], time_width)
        self.pooled_embedding = EmbeddingMLP(conditioning_dim, time_width) if pooled_conditioning else None
        self.position = None
        if position_size > 0:
            self.position = nn.Parameter(position_waves(channels[0], position_size))
            self.position_gain = nn.Linear(time_width, channels[0])
            nn.init.normal_(self.position_gain.weight, std=POSITION_GAIN_STD)
            nn.init.zeros_(self.position_gain.bias)

        plan = BlockPlan(time_width, conditioning_dim, head_dim, norm_groups, scale_shift)
        self.conv_in = nn.Conv2d(patch_channels * (2 if image_conditioning else 1), channels[0], 3, padding=1)
        self.down, skips = build_down(plan, self.channels, blocks_per_level, self.transformer_depth)
        self.middle = MiddleLevel(plan, channels[-1], middle_depth(self.transformer_depth))
        self.up = build_up(plan, self.channels, blocks_per_level, self.transformer_depth, skips)
        self.norm_out = GroupNorm(norm_groups, channels[0], eps=NORM_EPS)
        self.conv_out = zero_init(nn.Conv2d(channels[0], patch_channels, 3, padding=1))

    @property
    def min_divisor(self) -> int:
        """The number that must divide the height and width of the latents."""
        return self.patch_size * 2 ** (len(self.channels) - 1)

    def forward(self, x: Tensor, c_noise: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's output [B C h w] for `x` [B C h w] at noise level `c_noise` [B].

        `c_noise` is what the sines see: 0 to 1000 in Stable Diffusion. Raises ValueError for latents whose
        height or width `min_divisor` does not divide, and for a picture of another shape than `x`, or one
        that the network does not take.
        """
        check_size(x.shape[2], x.shape[3], self.min_divisor)
        x = self.beside(x, conditioning.image)
        time = self.time_embedding(noise_embedding(c_noise, self.channels[0]).to(x.dtype))
        if self.pooled_embedding is not None:
            time = time + self.pooled_embedding(conditioning.pooled.to(x.dtype))
        time = F.silu(time)
        context = conditioning.tokens.to(x.dtype)
        mask = conditioning.mask[:, None, None, :]

        x = self.conv_in(F.pixel_unshuffle(x, self.patch_size))
        if self.position is not None:
            # A product of place and text: what "on the left" means, and slow to learn as a sum.
            gain = 1 + self.position_gain(time)[:, :, None, None]
            x = x + gain * resize_position(self.position, x.shape[2], x.shape[3])
        skips = [x]
        for down in self.down:
            skips += down(skips[-1], time, context, mask)
        x = self.middle(skips[-1], time, context, mask)
        for up in self.up:
            x = up(x, [skips.pop() for _ in range(self.blocks_per_level + 1)], time, context, mask)
        return F.pixel_shuffle(self.conv_out(self.norm_out(x, silu=True)), self.patch_size)

    def beside(self, x: Tensor, image: Tensor | None) -> Tensor:
        """What the first convolution sees: `x` [B C h w], with `image_conditioning` beside the picture's.

        A network that takes no picture and is given one would not edit but invent: ValueError.
        """
        if not self.image_conditioning:
            if image is not None:
                raise ValueError(
                    "the conditioning holds a picture, but this backbone takes none: train one with "
                    "backbone.image_conditioning=true"
                )
            return x
        if image is None:
            image = torch.zeros_like(x)
        if image.shape != x.shape:
            raise ValueError(
                f"the picture's latents are {tuple(image.shape)} and x is {tuple(x.shape)}: both are of one "
                "shape"
            )
        return torch.cat([x, image.to(x.dtype)], dim=1)


def middle_depth(transformer_depth: tuple[int, ...]) -> int:
    """The transformer blocks in the middle: those of the lowest level that attends, 0 where none does."""
    return next((depth for depth in reversed(transformer_depth) if depth > 0), 0)


def build_down(
    plan: BlockPlan, channels: tuple[int, ...], blocks: int, transformer_depth: tuple[int, ...]
) -> tuple[nn.ModuleList, list[int]]:
    """The levels on the way down, and the channels of every feature map kept for the way up, in order."""
    levels, skips = nn.ModuleList(), [channels[0]]
    for i, width in enumerate(channels):
        last = i == len(channels) - 1
        levels.append(DownLevel(plan, skips[-1], width, blocks, transformer_depth[i], last))
        skips += [width] * (blocks if last else blocks + 1)
    return levels, skips


def build_up(
    plan: BlockPlan,
    channels: tuple[int, ...],
    blocks: int,
    transformer_depth: tuple[int, ...],
    skips: list[int],
) -> nn.ModuleList:
    """The levels on the way up, one block more than on the way down, which together use up all of `skips`."""
    levels, skips, in_channels = nn.ModuleList(), list(skips), channels[-1]
    for i in reversed(range(len(channels))):
        used = [skips.pop() for _ in range(blocks + 1)]
        levels.append(UpLevel(plan, in_channels, used, channels[i], transformer_depth[i], last=i == 0))
        in_channels = channels[i]
    return levels


def position_waves(channels: int, size: int) -> Tensor:
    """The position map [1 C s s] at the start: waves of 1/2 to 8 periods, half along x and half along y.

    From 0 it would have to be learnt before a word such as "left" could mean anything.
    """
    place = (torch.arange(size) + 0.5) / size
    along_x = channels // 2

    def waves(count: int) -> Tensor:
        octave = torch.arange(count) // 2 * (8 / max(count, 1))
        phase = (
            2 * math.pi * 0.5 * 2 ** octave[:, None] * place + torch.arange(count)[:, None] % 2 * math.pi / 2
        )
        return 0.5 * phase.sin()

    x = waves(along_x)[:, None, :].expand(-1, size, -1)
    y = waves(channels - along_x)[:, :, None].expand(-1, -1, size)
    return torch.cat([x, y])[None]


def resize_position(position: Tensor, height: int, width: int) -> Tensor:
    """The position map [1 C s s] at [1 C height width]: itself where the size is s, else bilinear."""
    if position.shape[2:] == (height, width):
        return position
    return F.interpolate(position, size=(height, width), mode="bilinear", align_corners=False)


def check_shape(
    channels: tuple[int, ...],
    blocks_per_level: int,
    transformer_depth: tuple[int, ...],
    head_dim: int,
    norm_groups: int,
) -> None:
    """None for settings that fit together; ValueError naming the first that does not."""
    if len(channels) != len(transformer_depth):
        raise ValueError(
            f"transformer_depth has {len(transformer_depth)} entries for {len(channels)} levels of channels: "
            "give one for each level, 0 for no attention"
        )
    if not channels or blocks_per_level < 1:
        raise ValueError("a UNet needs at least one level and blocks_per_level of at least 1")
    for width in channels:
        if width % norm_groups != 0 or width % 2 != 0:
            raise ValueError(f"channels {width} must be even and a multiple of norm_groups {norm_groups}")
    attending = [width for width, depth in zip(channels, transformer_depth, strict=True) if depth > 0]
    for width in [*attending, channels[-1]] if attending else []:
        if width % head_dim != 0:
            raise ValueError(f"channels {width} attend and are no multiple of head_dim {head_dim}")


def check_size(height: int, width: int, divisor: int) -> None:
    """None when `divisor` divides both sides of the latents; else ValueError naming the nearest sizes."""
    for side in (height, width):
        if side % divisor != 0:
            below, above = side // divisor * divisor, (side // divisor + 1) * divisor
            nearest = f"{below} or {above}" if below > 0 else f"{above}"
            raise ValueError(
                f"latents of {height}x{width}: each side must be a multiple of {divisor}, nearest {nearest}"
            )
