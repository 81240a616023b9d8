"""3x3 convolutions in a quarter of the multiplications, where a CPU trains in float32.

A tile of 4x4 outputs is 36 products of transformed inputs and transformed kernels, where the sum over the
window takes 144 (Winograd 1980; Lavin and Gray 2016, arXiv:1509.09308, F(4x4, 3x3)). Forward pass, gradient
of the input and gradient of the kernel are each two transforms (`winograd.cpp`) around 36 matrix products.
Errors are 2e-6 of the largest result, several times those of the sum. Used by the blocks, switched on by
`models.stages.compute`; in bfloat16 the processor's own units are faster, and such errors would be large.
"""

import ctypes
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.fused import first_order, serves
from models.kernels import kernels

TILE = 4
#: Numbers of a transformed map at once: what the cache next to a core or two holds.
CHUNK = 1024 * 1024
#: Channels below which the transforms cost more than they save.
LEAST = 64
#: Tiles of a batch below which transforming the kernels costs more than it saves.
LEAST_TILES = 16
#: Floats between planes: at powers of two apart they would fall on the same lines of a cache.
_APART = 48
_SPACE = CHUNK + 36 * _APART
#: Floats kept for the transform of a kernel, and as many for its gradient: those of 256 channels to 256.
_KERNEL_SPACE = 36 * (256 * 256 + _APART)
#: Of each thread, kept: memory that no cache holds any more costs more than a transform.
_rooms = threading.local()


class Map(ctypes.Structure):
    """Of a feature map: samples, height, width, channels; floats from one plane to the next."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("samples", "height", "width", "channels", "plane"))


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
            and min(self.in_channels, self.out_channels) >= LEAST
            and self.in_channels % 16 == self.out_channels % 16 == 0
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
        shape = (x.shape[0], weight.shape[0], *x.shape[2:])
        y = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
        kernel = transform(weight)
        for part in chunks(x, max(weight.shape[:2])):
            factors, products = planes(0, x[part]), planes(1, y[part])
            _call("winograd_input", x[part], factors)
            torch.bmm(factors, kernel.transpose(1, 2), out=products)
            _call("winograd_output", y[part], products, None if bias is None else bias.contiguous())
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """The gradients of `x`, `weight` and `bias`."""
        first_order()
        x, weight = ctx.saved_tensors
        up = gradients[0].contiguous(memory_format=torch.channels_last)
        of_x = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        kernel = transform(weight)
        of_kernel = kernel_planes(1, weight, 0)  # products are written at once only to planes without gaps
        for part in chunks(x, max(weight.shape[:2])):
            factors, products = planes(0, x[part]), planes(1, up[part])
            _call("winograd_input", x[part], factors)
            _call("winograd_output_gradient", up[part], products)
            if part.start == 0:
                torch.bmm(products.transpose(1, 2), factors, out=of_kernel)
            else:
                of_kernel.baddbmm_(products.transpose(1, 2), factors)
            if of_x is not None:
                torch.bmm(products, kernel, out=factors)  # the factors have served, and lend their place
                _call("winograd_input_gradient", of_x[part], factors)
        of_bias = up.sum((0, 2, 3)) if ctx.biased else None
        return of_x, inverse(of_kernel), of_bias


def transform(weight: Tensor) -> Tensor:
    """The transformed kernels [36 out in] of `weight` [out in 3 3], until the next are made."""
    weight = weight.contiguous(memory_format=torch.channels_last)
    kernel = kernel_planes(0, weight, _APART)
    _call_kernel("winograd_kernel", kernel, weight, kernel)
    return kernel


def inverse(of_kernel: Tensor) -> Tensor:
    """The gradient of a weight [out in 3 3] from that of its transform [36 out in], channels-last."""
    shape = (*of_kernel.shape[1:], 3, 3)
    of_weight = torch.empty(shape, dtype=of_kernel.dtype, memory_format=torch.channels_last)
    _call_kernel("winograd_kernel_gradient", of_kernel, of_kernel, of_weight)
    return of_weight


def kernel_planes(number: int, weight: Tensor, apart: int) -> Tensor:
    """Room 0 or 1 for the transform of `weight` [out in 3 3]: [36 out in], `apart` floats between planes."""
    return _room("kernels", _KERNEL_SPACE, number, weight, weight.shape[:2], apart)


def chunks(x: Tensor, channels: int) -> list[slice]:
    """The samples of `x` [B C h w] in portions whose transforms, of `channels`, stay in a cache."""
    each = 36 * channels * (x.shape[2] // TILE) * (x.shape[3] // TILE)
    size = max(1, CHUNK // each)
    return [slice(start, min(start + size, len(x))) for start in range(0, len(x), size)]


def planes(number: int, x: Tensor) -> Tensor:
    """Room 0 or 1 for the transform of `x` [B C h w]: [36 tiles C], whatever was there before."""
    tiles = x.shape[0] * (x.shape[2] // TILE) * (x.shape[3] // TILE)
    return _room("maps", _SPACE, number, x, (tiles, x.shape[1]), _APART)


def _room(kept: str, space: int, number: int, like: Tensor, shape: Sequence[int], apart: int) -> Tensor:
    """36 planes of `shape`, `apart` floats between them, in room 0 or 1 of `space` floats that are `kept`.

    What takes more than a room, as one sample alone may, gets memory of its own.
    """
    rows, columns = shape
    plane = rows * columns + apart
    strided = (36, rows, columns), (plane, columns, 1)
    if 36 * plane > space:
        return like.new_empty(36 * plane).as_strided(*strided)
    if not hasattr(_rooms, kept):
        setattr(_rooms, kept, torch.empty(2 * space))
    room: Tensor = getattr(_rooms, kept)
    return room.as_strided(*strided, number * space)


def _call(name: str, x: Tensor, transformed: Tensor, *more: Tensor | None) -> None:
    """Calls a transform between `x` [B C h w] and its planes; what is read goes before what is written."""
    library = kernels()
    assert library is not None
    shape = Map(x.shape[0], x.shape[2], x.shape[3], x.shape[1], transformed.stride(0))
    begins = name in ("winograd_input", "winograd_output_gradient")
    tensors = [x, transformed] if begins else [transformed, *more, x]
    addresses = [None if each is None else ctypes.c_void_p(each.data_ptr()) for each in tensors]
    getattr(library, name)(ctypes.byref(shape), *addresses, ctypes.c_int(torch.get_num_threads()))


def _call_kernel(name: str, transformed: Tensor, read: Tensor, written: Tensor) -> None:
    """Calls a transform between kernels and their planes, `transformed` [36 out in]."""
    library = kernels()
    assert library is not None
    _, out, within = transformed.shape
    sizes = [ctypes.c_int64(each) for each in (out, within, transformed.stride(0))]
    addresses = [ctypes.c_void_p(each.data_ptr()) for each in (read, written)]
    getattr(library, name)(*sizes, *addresses, ctypes.c_int(torch.get_num_threads()))
