"""A linear layer that can multiply in 8 bits.

Weights stay float32. With `float8` set, weight and input become e4m3 and the gradient e5m2 (Micikevicius et
al. 2022, arXiv:2209.05433), each divided by one scale a tensor, from its own largest number at each call. The
three products of forward and backward pass are `torch._scaled_mm`, summed in float32, given as bfloat16.
Used by the blocks (`models.blocks`), switched on by `trainer.precision=fp8`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: What a side of a product has to be a multiple of.
_STEP = 16
FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2


class Linear(nn.Linear):
    """`nn.Linear`, whose product is of 8 bits where `float8` is set and both widths divide by 16."""

    float8 = False

    def forward(self, x: Tensor) -> Tensor:
        """The products [.. out] of `x` [.. in]; bfloat16 where they are of 8 bits."""
        if not self.float8 or self.in_features % _STEP or self.out_features % _STEP:
            return super().forward(x)
        product = Float8Product.apply(x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])
        return product if self.bias is None else product + self.bias.to(product.dtype)


class Float8Product(torch.autograd.Function):
    """`x` [N in] times the transposed `weight` [out in], and the gradients of both: [N out] bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """The product; keeps `x` in 8 bits."""
        small, scale = quantize(x, FORWARD)
        kernel, kernel_scale = quantize(weight, FORWARD)
        ctx.save_for_backward(small, scale, weight)
        ctx.dtype = x.dtype
        return multiply(small, kernel.t(), scale, kernel_scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of `x`, in its type, and of `weight`, float32."""
        x, scale, weight = ctx.saved_tensors
        gradient, gradient_scale = quantize(gradients[0], BACKWARD)
        kernel, kernel_scale = quantize(weight, FORWARD)
        of_x = multiply(gradient, kernel, gradient_scale, kernel_scale)
        of_weight = multiply(gradient.t(), x, gradient_scale, scale)
        return of_x.to(ctx.dtype), of_weight.to(weight.dtype)


def quantize(tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`tensor` divided by a scale, in 8 bits, and the scale `[]` float32."""
    largest = torch.finfo(dtype).max
    scale = (tensor.detach().abs().amax().float() / largest).clamp(min=torch.finfo(torch.float32).tiny)
    return (tensor.detach().float() / scale).clamp(-largest, largest).to(dtype), scale


def multiply(left: Tensor, right: Tensor, left_scale: Tensor, right_scale: Tensor) -> Tensor:
    """The product [N M] of `left` [N K] and `right` [K M] times both scales, bfloat16."""
    rows, inner = left.shape
    # Zeros add nothing to a sum; what comes of rows that were added is cut off.
    left = F.pad(left.view(torch.uint8), (0, -inner % _STEP, 0, -rows % _STEP)).view(left.dtype)
    right = F.pad(right.view(torch.uint8), (0, 0, 0, -inner % _STEP)).view(right.dtype)
    by_columns = right.t().contiguous().t()
    product = torch._scaled_mm(
        left.contiguous(), by_columns, scale_a=left_scale, scale_b=right_scale, out_dtype=torch.bfloat16
    )
    return product[:rows]
