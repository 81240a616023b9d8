"""The feed-forward of a transformer, and how a CPU trains it in float32 without what lies inside in memory.

Between its two products a feed-forward is 12 times as wide as what it is given. `feed_forward.cpp` takes some
rows at a time through both products and the gate, keeps nothing, and makes the first product again in the
backward pass (as Chen et al. 2016, arXiv:1604.06174), which costs about what writing and reading its result
would, where that is large. Used by the blocks, switched on by `models.stages.compute`.
"""

import ctypes
import math
from typing import Any

import torch
from torch import Tensor, nn

from models.float8 import Linear
from models.fused import Geglu, first_order, serves
from models.kernels import kernels, operation, room

#: What the width has to be a multiple of, and the most: sums of gradients take 8 times the weights' memory.
STEP, MOST = 16, 192
#: Numbers of the input below which what lies inside, 8 MB, stays in a cache: making it again costs more.
LEAST = 2**18


class Shape(ctypes.Structure):
    """Rows, their width, and that of the gate."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("rows", "width", "inside"))


class FeedForward(nn.Module):
    """Linear, GEGLU, linear with four times the width inside (Shazeer 2020, arXiv:2002.05202): [B L D]."""

    native = False

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = Linear(width, 8 * width)
        self.gate = Geglu()
        self.contract = Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """The transformed tokens [B L D]."""
        if self.native and not torch.compiler.is_compiling() and self.suits(x) and serves(x):
            weights = (self.expand.weight, self.expand.bias, self.contract.weight, self.contract.bias)
            return RowsTogether.apply(x, *weights)
        return self.contract(self.gate(self.expand(x)))

    def suits(self, x: Tensor) -> bool:
        """Whether the kernels know type, layout and width of `x` and the weights, and save something."""
        return (
            x.shape[-1] % STEP == 0
            and x.shape[-1] <= MOST
            and x.numel() >= LEAST
            and x.dtype == self.expand.weight.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
            and x.is_contiguous()
            and all(layer.weight.is_contiguous() for layer in (self.expand, self.contract))
            # A gradient of some of them alone is torch's to give.
            and (not torch.is_grad_enabled() or all(each.requires_grad for each in self.parameters()))
        )


class RowsTogether(torch.autograd.Function):
    """`FeedForward` of `x` [.. D] by `expand` [8D D], `contract` [D 4D] and biases; keeps these alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, expand: Tensor, wide: Tensor, contract: Tensor, narrow: Tensor
    ) -> Tensor:
        """The transformed rows [.. D]."""
        ctx.save_for_backward(x, expand, wide, contract)
        return torch.ops.firstlight.feed_forward(x, expand, wide, contract, narrow)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        """The gradients of all five."""
        first_order()
        x, expand, wide, contract = ctx.saved_tensors
        up = gradients[0].contiguous()
        of_x, found = torch.ops.firstlight.feed_forward_gradient(x, expand, wide, contract, up)
        of_expand, of_contract, of_wide, of_narrow = found.split(
            [expand.numel(), contract.numel(), len(wide), len(contract)]
        )
        return of_x, of_expand.view_as(expand), of_wide, of_contract.view_as(contract), of_narrow


def _forward(x: Tensor, expand: Tensor, wide: Tensor, contract: Tensor, narrow: Tensor) -> Tensor:
    y, (library, shape, threads) = torch.empty_like(x), _called(x, contract)
    own = room(library.feed_forward_room(shape, threads))
    library.feed_forward(shape, *_places(x, expand, wide, contract, narrow, y, own), threads)
    return y


def _gradient(x: Tensor, expand: Tensor, wide: Tensor, contract: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    (of_x, slopes), (library, shape, threads) = _slopes(x, expand, wide, contract, up), _called(x, contract)
    own = room(library.feed_forward_gradient_room(shape, threads))
    places = _places(x, expand, wide, contract, up, of_x, slopes, own)
    library.feed_forward_gradient(shape, *places, threads)
    return of_x, slopes


def _slopes(x: Tensor, expand: Tensor, wide: Tensor, contract: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the gradient of `x`, and for those of the weights and biases, one behind the other."""
    weights = expand.numel() + contract.numel() + len(wide) + len(contract)
    return torch.empty_like(x), x.new_empty(weights)


def _called(x: Tensor, contract: Tensor) -> tuple[ctypes.CDLL, Any, ctypes.c_int]:
    """The kernels, and what they are told of rows `x` [.. D] and of `contract` [D 4D]."""
    library = kernels()
    assert library is not None
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    assert x.shape[-1] % STEP == 0
    for name in ("feed_forward_room", "feed_forward_gradient_room"):
        getattr(library, name).restype = ctypes.c_int64
    shape = Shape(x.shape[:-1].numel(), *contract.shape)
    return library, ctypes.byref(shape), ctypes.c_int(torch.get_num_threads())


def _places(*tensors: Tensor) -> list[ctypes.c_void_p]:
    """Where they lie; whoever calls holds them for as long as that is read."""
    return [ctypes.c_void_p(each.data_ptr()) for each in tensors]


def _flops(x: torch.Size, contract: torch.Size, products: int) -> int:
    """Of so many products of rows `x` [.. D] with a weight as large as `contract` [D 4D]."""
    return 2 * products * math.prod(x) * contract[1]


operation("feed_forward(Tensor x, Tensor expand, Tensor wide, Tensor contract, Tensor narrow) -> Tensor",
          _forward, lambda x, *_: torch.empty_like(x))  # fmt: skip
operation("feed_forward_gradient(Tensor x, Tensor expand, Tensor wide, Tensor contract, Tensor up)"
          " -> (Tensor, Tensor)", _gradient, _slopes)  # fmt: skip

#: What counts FLOPs is told these; the product that is made again is not counted twice.
FLOPS = {
    torch.ops.firstlight.feed_forward: lambda x, _, __, contract, *___, **____: _flops(x, contract, 3),
    torch.ops.firstlight.feed_forward_gradient: lambda x, _, __, contract, *___, **____: _flops(
        x, contract, 6
    ),
}
