"""Group norm with SiLU, and GEGLU, each in one pass over memory in a training on a CPU.

Both modules compute by torch's own operations, which every device, transform and compiler knows. With
`native` set, on a CPU, they compute by `models.kernels` instead: to rounding the same, with fewer passes,
and without keeping what lies in between (the backward pass makes it again from the input). Switched on by
`models.stages.compute`, where the kernels are there.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from models.kernels import Shape, kernels, operation

#: What the kernels for a type of numbers are called.
SUFFIX = {torch.float32: "float", torch.bfloat16: "bfloat16"}


def serves(x: Tensor) -> bool:
    """Whether the kernels may compute on `x`, where `native` says that they are there."""
    return x.device.type == "cpu" and x.dtype in SUFFIX and first_order_at_most() and is_plain(x)


def is_plain(x: Tensor) -> bool:
    """Whether `x` is a tensor with memory of its own and not something that behaves like one."""
    return torch.compiler.is_compiling() or (type(x) in (Tensor, nn.Parameter) and kernels() is not None)


def first_order_at_most() -> bool:
    """Whether no more is wanted than values, or first derivatives by the backward pass."""
    if torch.compiler.is_compiling():
        return torch.is_grad_enabled()  # without gradients a compiler fuses what the kernels do itself
    return not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0


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
        y, mean, scale = torch.ops.firstlight.norm_forward(x, before, gain, bias, groups, eps, silu)
        ctx.save_for_backward(x, before, gain, bias, mean, scale)
        ctx.silu = silu
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of `x`, `before`, `gain` and `bias`."""
        first_order()
        _, before, gain, _, _, _ = ctx.saved_tensors
        of_x, of_before, of_gain, of_bias = torch.ops.firstlight.norm_backward(
            *ctx.saved_tensors, gradients[0], ctx.silu
        )
        if gain.ndim == 1:
            of_gain, of_bias = of_gain.sum(0), of_bias.sum(0)
        return of_x, None if before is None else of_before, of_gain, of_bias, None, None, None


class GatedGelu(torch.autograd.Function):
    """`Geglu` as one pass; keeps its input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """The gated values [.. D] of `x` [.. 2D]."""
        ctx.save_for_backward(x)
        return torch.ops.firstlight.gate_forward(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """The gradient of `x`."""
        first_order()
        return torch.ops.firstlight.gate_backward(*ctx.saved_tensors, gradients[0])


Norm = tuple[Tensor, Tensor, Tensor]
Slopes = tuple[Tensor, Tensor, Tensor, Tensor]


def _layout(x: Tensor) -> torch.memory_format:
    """That of a feature map's kernels: channels-last where `x` is that."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _shape(x: Tensor, gain: Tensor, groups: int) -> Any:
    """What a norm's kernel is told of `x` [B C h w]."""
    samples, channels, height, width = x.shape
    own = channels if gain.ndim == 2 else 0
    return ctypes.byref(Shape(samples, channels, height * width, groups, own))


def _made_by_norm(x: Tensor, groups: int) -> Norm:
    """Room for what a norm returns: its output, and mean and scale of every group."""
    y = torch.empty_like(x, memory_format=_layout(x))
    mean, scale = (x.new_empty(len(x), groups, dtype=torch.float32) for _ in range(2))
    return y, mean, scale


def _norm_forward(
    x: Tensor, before: Tensor | None, gain: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> Norm:
    layout = _layout(x)
    x = x.contiguous(memory_format=layout)
    before = None if before is None else before.contiguous()
    found = _made_by_norm(x, groups)
    _call("norm_forward", x, _shape(x, gain, groups), ctypes.c_float(eps), x, before, gain.contiguous(),
          bias.contiguous(), *found, layout is torch.channels_last, silu)  # fmt: skip
    return found


def _slopes_of_norm(x: Tensor, before: Tensor | None) -> Slopes:
    """Room for the gradients of a norm's inputs; those of gain and bias are of each sample."""
    of_x = torch.empty_like(x, memory_format=_layout(x))
    of_before = x.new_empty(0 if before is None else before.shape, dtype=torch.float32)
    of_gain, of_bias = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    return of_x, of_before, of_gain, of_bias


def _norm_backward(
    x: Tensor,
    before: Tensor | None,
    gain: Tensor,
    bias: Tensor,
    mean: Tensor,
    scale: Tensor,
    up: Tensor,
    silu: bool,
) -> Slopes:
    layout, groups = _layout(x), mean.shape[1]
    x, up = x.contiguous(memory_format=layout), up.to(x.dtype).contiguous(memory_format=layout)
    before = None if before is None else before.contiguous()
    of_x, of_before, of_gain, of_bias = found = _slopes_of_norm(x, before)
    _call("norm_backward", x, _shape(x, gain, groups), x, before, gain.contiguous(), bias.contiguous(), mean,
          scale, up, of_x, None if before is None else of_before, of_gain, of_bias,
          layout is torch.channels_last, silu)  # fmt: skip
    return found


def _made_by_gate(x: Tensor) -> Tensor:
    """Room for the gated values [.. D] of `x` [.. 2D]."""
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


def _gate_forward(x: Tensor) -> Tensor:
    y = _made_by_gate(x)
    _call("gate_forward", x, *_rows(x), x.contiguous(), y)
    return y


def _gate_backward(x: Tensor, up: Tensor) -> Tensor:
    x = x.contiguous()
    of_x = torch.empty_like(x)
    _call("gate_backward", x, *_rows(x), x, up.to(x.dtype).contiguous(), of_x)
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
    getattr(library, f"{name}_{SUFFIX[like.dtype]}")(*given, ctypes.c_int(torch.get_num_threads()))


operation(
    "norm_forward(Tensor x, Tensor? before, Tensor gain, Tensor bias, int groups, float eps, bool silu)"
    " -> (Tensor, Tensor, Tensor)",
    _norm_forward,
    lambda x, before, gain, bias, groups, eps, silu: _made_by_norm(x, groups),
)
operation(
    "norm_backward(Tensor x, Tensor? before, Tensor gain, Tensor bias, Tensor mean, Tensor scale, Tensor up,"
    " bool silu) -> (Tensor, Tensor, Tensor, Tensor)",
    _norm_backward,
    lambda x, before, gain, bias, mean, scale, up, silu: _slopes_of_norm(x, before),
)
operation(
    "gate_forward(Tensor x) -> Tensor",
    _gate_forward,
    _made_by_gate,
)
operation(
    "gate_backward(Tensor x, Tensor up) -> Tensor",
    _gate_backward,
    lambda x, up: torch.empty_like(x, memory_format=torch.contiguous_format),
)
