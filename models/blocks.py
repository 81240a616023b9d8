"""The parts of the UNet and the autoencoder: residual blocks, attention, resampling, noise embedding.

Notable choices: the layout is that of Stable Diffusion, so that weights move to diffusers and back by
renaming alone (`models.diffusers_layout`). Every residual branch ends in a zero-initialised layer, so that a
fresh network is the identity plus its shortcuts (Dhariwal and Nichol 2021, arXiv:2105.05233). Feature maps
become tokens by `permute(0, 2, 3, 1)`, which is a view when the map is channels-last.

Used by `models.unet` and `models.autoencoder`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.attention import attention
from models.feed_forward import FeedForward
from models.float8 import Linear
from models.fused import GroupNorm
from models.winograd import Conv2d


def zero_init(layer: nn.Conv2d | nn.Linear) -> nn.Conv2d | nn.Linear:
    """The layer itself with weight and bias set to zero."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def noise_embedding(c_noise: Tensor, width: int) -> Tensor:
    """Cosines then sines of `c_noise` [B] at `width / 2` frequencies from 1 down to 1e-4: [B width] float32.

    Source: Vaswani et al. 2017 (arXiv:1706.03762) section 3.5, with the cosines first as in Ho et al. 2020.
    """
    half = width // 2
    exponent = torch.arange(half, device=c_noise.device, dtype=torch.float32) / half
    angle = c_noise.float()[:, None] * torch.exp(-math.log(10000.0) * exponent)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class Block(nn.Module, ABC):
    """What a deep network is many of: the unit that is sharded, compiled or computed again on its own.

    With `recompute` set, what `run` made in between is not kept for the backward pass but made again there:
    memory for about a third more arithmetic (Chen et al. 2016, arXiv:1604.06174). Gradients keep every bit.
    `compiled` is what takes the place of `run` where the block is compiled.
    """

    recompute = False
    compiled: Callable[..., Tensor] | None = None

    @abstractmethod
    def run(self, *inputs: Any, **named: Any) -> Tensor:
        """The block's output."""

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """The block's output, as `run` says."""
        run = self.run if self.compiled is None else self.compiled
        if self.recompute and torch.is_grad_enabled():
            # No block draws a random number, so that there is no state of a generator to put back.
            return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False, **named)
        return run(*inputs, **named)


class EmbeddingMLP(nn.Module):
    """Two linear layers with a SiLU between: [B in_width] -> [B width]."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.linear_in = nn.Linear(in_width, width)
        self.linear_out = nn.Linear(width, width)

    def forward(self, vector: Tensor) -> Tensor:
        """The embedding [B width] of `vector` [B in_width]."""
        return self.linear_out(F.silu(self.linear_in(vector)))


class ResidualBlock(Block):
    """GroupNorm, SiLU, 3x3 convolution, twice, around a shortcut: [B in C h w] -> [B out C h w].

    `time_width` > 0 adds a modulation by a vector between the two halves: a shift, or with `scale_shift` a
    scale and a shift after the second norm (Dhariwal and Nichol 2021, "AdaGN").
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm_groups: int,
        norm_eps: float,
        time_width: int = 0,
        scale_shift: bool = False,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.norm_in = GroupNorm(norm_groups, in_channels, eps=norm_eps)
        self.conv_in = Conv2d(in_channels, out_channels, 3, padding=1)
        modulation = out_channels * (2 if scale_shift else 1)
        self.modulation = nn.Linear(time_width, modulation) if time_width > 0 else None
        self.norm_out = GroupNorm(norm_groups, out_channels, eps=norm_eps)
        self.conv_out = zero_init(Conv2d(out_channels, out_channels, 3, padding=1))
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def run(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """The block's output [B C h w]; `time` [B time_width] is the embedding after its SiLU."""
        h = self.conv_in(self.norm_in(x, silu=True))
        if self.modulation is None:
            h = self.norm_out(h, silu=True)
        elif self.scale_shift:
            scale, shift = self.modulation(time).chunk(2, dim=1)
            h = self.norm_out(h, scale=scale, shift=shift, silu=True)
        else:
            h = self.norm_out(h, before=self.modulation(time), silu=True)
        h = self.conv_out(h)
        return h + (x if self.shortcut is None else self.shortcut(x))


class Attention(nn.Module):
    """Multi-head attention [B Lq D] of tokens over a context of width `context_width` (D: self-attention)."""

    native = False

    def __init__(self, width: int, heads: int, context_width: int, bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.query = Linear(width, width, bias=bias)
        self.key = Linear(context_width, width, bias=bias)
        self.value = Linear(context_width, width, bias=bias)
        self.out = Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention of `x` [B Lq D] over `context` [B Lk context_width]; `mask` as in `attention`."""
        query, key, value = (
            states.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for states in (self.query(x), self.key(context), self.value(context))
        )
        return self.out(attention(query, key, value, mask, self.native).transpose(1, 2).flatten(2))


class TransformerBlock(Block):
    """Self-attention, cross-attention to the text and a feed-forward, each behind a LayerNorm: [B L D]."""

    def __init__(self, width: int, heads: int, context_width: int) -> None:
        super().__init__()
        self.norm_self = nn.LayerNorm(width)
        self.self_attention = Attention(width, heads, width)
        self.norm_cross = nn.LayerNorm(width)
        self.cross_attention = Attention(width, heads, context_width)
        self.norm_feed = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width)

    def run(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """The transformed tokens [B L D]; `context` [B Lk context_width], `mask` bool [B 1 1 Lk]."""
        h = self.norm_self(x)
        x = x + self.self_attention(h, h)
        x = x + self.cross_attention(self.norm_cross(x), context, mask)
        return x + self.feed_forward(self.norm_feed(x))


class SpatialTransformer(nn.Module):
    """`depth` transformer blocks over the positions of a feature map [B C h w], around a shortcut."""

    def __init__(self, channels: int, heads: int, context_width: int, depth: int, norm_groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(norm_groups, channels, eps=1e-6)
        self.project_in = Linear(channels, channels)
        self.blocks = nn.ModuleList(TransformerBlock(channels, heads, context_width) for _ in range(depth))
        self.project_out = zero_init(Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """The feature map [B C h w] after attention; `context` and `mask` as in `TransformerBlock`."""
        height, width = x.shape[2:]
        h = self.project_in(self.norm(x).permute(0, 2, 3, 1).flatten(1, 2))
        for block in self.blocks:
            h = block(h, context, mask)
        return x + self.project_out(h).unflatten(1, (height, width)).permute(0, 3, 1, 2)


class SpatialSelfAttention(Block):
    """One-head self-attention over the positions of a feature map [B C h w], around a shortcut."""

    def __init__(self, channels: int, norm_groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(norm_groups, channels, eps=1e-6)
        self.attention = Attention(channels, 1, channels, bias=True)
        zero_init(self.attention.out)

    def run(self, x: Tensor) -> Tensor:
        """The feature map [B C h w] after attention."""
        height, width = x.shape[2:]
        h = self.norm(x).permute(0, 2, 3, 1).flatten(1, 2)
        h = self.attention(h, h)
        return x + h.unflatten(1, (height, width)).permute(0, 3, 1, 2)


class Downsample(nn.Module):
    """3x3 convolution of stride 2: [B C h w] -> [B C h/2 w/2].

    `asymmetric` pads right and bottom only, as the Stable Diffusion autoencoder does; otherwise all sides.
    """

    def __init__(self, channels: int, asymmetric: bool = False) -> None:
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        """The feature map at half the size."""
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Upsample(nn.Module):
    """Nearest-neighbour doubling and a 3x3 convolution: [B C h w] -> [B C 2h 2w]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """The feature map at twice the size."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
