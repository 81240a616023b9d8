"""3x3 convolutions in a quarter of the multiplications, in a training on a CPU in float32.

A tile of 4x4 outputs is 36 products of transformed inputs and transformed kernels, where the sum over the
window takes 144 (Winograd 1980; Lavin and Gray 2016, arXiv:1509.09308, F(4x4, 3x3)). `winograd.cpp` takes a
few tiles at a time through both transforms and the products between them. The gradient of the input is again
such a convolution, with the kernel turned; that of the kernel is 36 products over all tiles. Errors are 2e-6
of the largest result, several times those of the sum. Used by the blocks, switched on by
`models.stages.compute`; in bfloat16 the processor's own units are faster, and such errors would be large.
"""

import ctypes
import math
from typing import Any

import torch
from torch import Tensor, nn

from models.fused import first_order, serves
from models.kernels import kernels, operation, room

TILE, LANES = 4, 16
#: Tiles of a batch below which transforming the kernels costs more than it saves.
LEAST_TILES = 16


class Convolution(ctypes.Structure):
    """Samples, height and width of both maps; channels of the one that is read, and of the one made."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("samples", "height", "width", "within", "out"))


class Conv2d(nn.Conv2d):
    """`nn.Conv2d`, which with `native` set computes what it can in this way."""

    native = False

    def forward(self, x: Tensor) -> Tensor:
        """The feature map [B out h w] of `x` [B in h w]."""
        if self.native and not torch.compiler.is_compiling() and self.suits(x) and serves(x):
            return Winograd.apply(x, self.weight, self.bias)
        return super().forward(x)

    def suits(self, x: Tensor) -> bool:
        """Whether the transforms know shape, type and layout of `x` and of the kernel."""
        return (
            (self.kernel_size, self.stride, self.padding) == ((3, 3), (1, 1), (1, 1))
            and (self.dilation, self.groups, self.padding_mode) == ((1, 1), 1, "zeros")
            and self.in_channels % LANES == self.out_channels % LANES == 0
            and x.shape[2] % TILE == x.shape[3] % TILE == 0
            and x.shape[0] * x.shape[2] * x.shape[3] >= LEAST_TILES * TILE**2
            and x.dtype == self.weight.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
            and x.is_contiguous(memory_format=torch.channels_last)
        )


class Winograd(torch.autograd.Function):
    """The convolution of `x` [B in h w] with `weight` [out in 3 3], `bias` [out] or None, channels-last."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The feature map [B out h w], channels-last."""
        ctx.save_for_backward(x, weight)
        return torch.ops.firstlight.winograd_forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of `x`, `weight` and `bias`."""
        first_order()
        x, weight = ctx.saved_tensors
        up = gradients[0].contiguous(memory_format=torch.channels_last)
        of_x = torch.ops.firstlight.winograd_input_gradient(up, weight) if ctx.needs_input_grad[0] else None
        of_weight = torch.ops.firstlight.winograd_kernel_gradient(x, up) if ctx.needs_input_grad[1] else None
        return of_x, of_weight, up.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = _map(x, len(weight))
    _convolve(x, weight, None if bias is None else bias.contiguous(), y, turned=False)
    return y


def _input_gradient(up: Tensor, weight: Tensor) -> Tensor:
    of_x = _map(up, weight.shape[1])
    _convolve(up, weight, None, of_x, turned=True)
    return of_x


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, turned: bool) -> None:
    """Fills `y` [B out h w] from `x` [B in h w] and `weight` [out in 3 3], or [in out 3 3] if `turned`."""
    _check(x)
    shape, threads = _shape(x, y), ctypes.c_int(torch.get_num_threads())
    weight = _last(weight)  # a copy has to live until the call is over
    own = room(_library().winograd_room(ctypes.byref(shape), threads))
    given = [None if each is None else ctypes.c_void_p(each.data_ptr()) for each in (x, weight, bias, y, own)]
    _library().winograd_convolve(ctypes.byref(shape), *given, ctypes.c_int(turned), threads)


def _kernel_gradient(x: Tensor, up: Tensor) -> Tensor:
    _check(x)
    _check(up)
    of_weight, shape = _kernel(x, up), _shape(x, up)
    own = room(_library().winograd_gradient_room(ctypes.byref(shape)))
    given = [ctypes.c_void_p(each.data_ptr()) for each in (x, up, of_weight, own)]
    threads = ctypes.c_int(torch.get_num_threads())
    _library().winograd_kernel_gradient(ctypes.byref(shape), *given, threads)
    return of_weight


def _library() -> ctypes.CDLL:
    library = kernels()
    assert library is not None
    for name in ("winograd_room", "winograd_gradient_room"):
        getattr(library, name).restype = ctypes.c_int64
    return library


def _shape(x: Tensor, y: Tensor) -> Convolution:
    """Of a convolution that makes `y` [B out h w] of `x` [B in h w]."""
    return Convolution(x.shape[0], x.shape[2], x.shape[3], x.shape[1], y.shape[1])


def _check(x: Tensor) -> None:
    """The functions read memory as `Conv2d.suits` says that it lies."""
    assert x.dtype == torch.float32
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert x.shape[1] % LANES == x.shape[2] % TILE == x.shape[3] % TILE == 0


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _map(x: Tensor, channels: int) -> Tensor:
    """Room for a map of as many positions as `x` [B C h w]."""
    shape = (x.shape[0], channels, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _kernel(x: Tensor, up: Tensor) -> Tensor:
    """Room for the gradient of the kernel that makes a map like `up` of `x`."""
    shape = (up.shape[1], x.shape[1], 3, 3)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _flops(x: torch.Size, channels: int) -> int:
    """Of the 36 products over the tiles of a map [B C h w], to or from `channels`."""
    return 2 * 36 * math.prod(x) // TILE**2 * channels


operation(
    "winograd_forward(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    _forward,
    lambda x, weight, bias: _map(x, len(weight)),
)
operation(
    "winograd_input_gradient(Tensor up, Tensor weight) -> Tensor",
    _input_gradient,
    lambda up, weight: _map(up, weight.shape[1]),
)
operation("winograd_kernel_gradient(Tensor x, Tensor up) -> Tensor", _kernel_gradient, _kernel)

#: What counts FLOPs is told these: of what is multiplied, which is a quarter of a convolution's.
FLOPS = {
    torch.ops.firstlight.winograd_forward: lambda x, weight, *_, **__: _flops(x, weight[0]),
    torch.ops.firstlight.winograd_input_gradient: lambda up, weight, **__: _flops(up, weight[1]),
    torch.ops.firstlight.winograd_kernel_gradient: lambda x, up, **__: _flops(x, up[1]),
}
