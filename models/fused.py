"""Group norm with SiLU, and GEGLU, each in one pass over memory where a CPU trains.

Both modules compute by torch's own operations, which every device, transform and compiler knows. With
`native` set, on a CPU, while gradients are wanted, they compute by `models.kernels` instead: to rounding the
same, with fewer passes, and without keeping what lies in between (the backward pass makes it again from the
input). Switched on by `models.stages.compute`, where the kernels are there.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from models.kernels import Shape, kernels

_SUFFIX = {torch.float32: "float", torch.bfloat16: "bfloat16"}


def serves(x: Tensor) -> bool:
    """Whether the kernels may compute on `x`."""
    return (
        x.device.type == "cpu"
        and x.dtype in _SUFFIX
        and in_training()
        and type(x) in (Tensor, nn.Parameter)
        and kernels() is not None
    )


def in_training() -> bool:
    """Whether all that is wanted are first derivatives by the backward pass, in eager mode."""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def first_order() -> None:
    """None in a backward pass that nobody wants to differentiate; else RuntimeError, not a wrong gradient."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "this gives first derivatives alone: for create_graph=True compute in float32, and build the way "
            "to compute with native=False"
        )


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm`, and what is done around it in a residual block."""

    native = False

    def forward(
        self,
        x: Tensor,
        before: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        silu: bool = False,
    ) -> Tensor:
        """`silu(norm(x + before) * (1 + scale) + shift)` [B C h w], in the type and layout of `x`.

        Args:
            x: the feature map [B C h w].
            before: added to each position [B C].
            scale: of each channel after the norm [B C], given with `shift`.
            shift: likewise.
            silu: whether a SiLU follows.
        """
        if self.native and serves(x):
            gain: Tensor = self.weight
            bias: Tensor = self.bias
            if scale is not None and shift is not None:
                by = 1 + scale.float()
                gain, bias = gain * by, bias * by + shift
            before = None if before is None else before.float()
            return NormSilu.apply(x, before, gain.float(), bias.float(), self.num_groups, self.eps, silu)
        h = super().forward(x if before is None else x + before[:, :, None, None])
        if scale is not None and shift is not None:
            h = h * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        return F.silu(h) if silu else h


class Geglu(nn.Module):
    """The first half of the last dimension times the GELU of the second (Shazeer 2020, arXiv:2002.05202)."""

    native = False

    def forward(self, x: Tensor) -> Tensor:
        """The gated values [.. D] of `x` [.. 2D]."""
        if self.native and serves(x):
            return GatedGelu.apply(x)
        hidden, gate = x.chunk(2, dim=-1)
        return hidden * F.gelu(gate)


class NormSilu(torch.autograd.Function):
    """Group norm of `x` [B C h w] + `before` [B C], times `gain` plus `bias` ([C] or [B C]), and SiLU or not.

    Keeps `x` and the statistics. Sums of gradients over the batch are torch's.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        before: Tensor | None,
        gain: Tensor,
        bias: Tensor,
        groups: int,
        eps: float,
        silu: bool,
    ) -> Tensor:
        """The feature map, in the type and layout of `x`."""
        last = x.is_contiguous(memory_format=torch.channels_last)
        x = x if last else x.contiguous()
        before = None if before is None else before.contiguous()
        gain, bias = gain.contiguous(), bias.contiguous()
        samples, channels = x.shape[:2]
        positions = x.shape[2] * x.shape[3]
        shape = Shape(samples, channels, positions, groups, channels if gain.ndim == 2 else 0)
        y = torch.empty_like(x)
        mean, scale = (x.new_empty(samples, groups, dtype=torch.float32) for _ in range(2))
        _call("norm_forward", x, ctypes.byref(shape), ctypes.c_float(eps), x, before, gain, bias, y, mean,
              scale, last, silu)  # fmt: skip
        ctx.save_for_backward(x, before, gain, bias, mean, scale)
        ctx.shape, ctx.last, ctx.silu = shape, last, silu
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of `x`, `before`, `gain` and `bias`."""
        first_order()
        x, before, gain, bias, mean, scale = ctx.saved_tensors
        layout = torch.channels_last if ctx.last else torch.contiguous_format
        up = gradients[0].to(x.dtype).contiguous(memory_format=layout)
        of_x = torch.empty_like(x)
        of_before = None if before is None else torch.empty_like(before)
        of_gain, of_bias = (gain.new_empty(x.shape[:2]) for _ in range(2))
        _call("norm_backward", x, ctypes.byref(ctx.shape), x, before, gain, bias, mean, scale, up, of_x,
              of_before, of_gain, of_bias, ctx.last, ctx.silu)  # fmt: skip
        if gain.ndim == 1:
            of_gain, of_bias = of_gain.sum(0), of_bias.sum(0)
        return of_x, of_before, of_gain, of_bias, None, None, None


class GatedGelu(torch.autograd.Function):
    """`Geglu` as one pass; keeps its input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """The gated values [.. D] of `x` [.. 2D]."""
        x = x.contiguous()
        width = x.shape[-1] // 2
        y = x.new_empty(*x.shape[:-1], width)
        _call("gate_forward", x, *_rows(x), x, y)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """The gradient of `x`."""
        first_order()
        (x,) = ctx.saved_tensors
        of_x = torch.empty_like(x)
        _call("gate_backward", x, *_rows(x), x, gradients[0].to(x.dtype).contiguous(), of_x)
        return of_x


def _rows(x: Tensor) -> tuple[ctypes.c_int64, ctypes.c_int64]:
    """The rows of `x` and half of their width."""
    return ctypes.c_int64(x.numel() // max(x.shape[-1], 1)), ctypes.c_int64(x.shape[-1] // 2)


def _call(name: str, like: Tensor, *arguments: Any) -> None:
    """Calls the kernel for the type of `like`; tensors go as their addresses, flags and threads as int."""
    library = kernels()
    assert library is not None
    given = [
        ctypes.c_void_p(each.data_ptr()) if isinstance(each, Tensor) else
        ctypes.c_int(each) if isinstance(each, bool) else each
        for each in arguments
    ]  # fmt: skip
    getattr(library, f"{name}_{_SUFFIX[like.dtype]}")(*given, ctypes.c_int(torch.get_num_threads()))
