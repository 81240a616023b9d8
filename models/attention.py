"""Attention, and how a CPU trains it: the scores of a few queries at a time, or of all, made again backwards.

Torch's fused attention is the best there is on a GPU, and as good where no gradient is wanted. In a training
on a CPU in float32, `attention_float.cpp` takes a half to nineteen twentieths of its time. In 16 bits torch's
backward pass takes most of a training step; there `attention_bfloat16.cpp` serves where the processor has
AVX512-BF16, and products of whole matrices elsewhere.

Used by `models.blocks` and `models.text_encoder`.
"""

import ctypes
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from models.fused import SUFFIX, first_order, first_order_at_most, serves
from models.kernels import kernels, operation

# Written out, training is 4 to 10 times faster on 64 tokens and 1.4 times on 256, but all Lq x Lk scores are
# there at once. Forward alone fused is faster.
EXPLICIT_MAX = 1024 * 1024


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, native: bool = False) -> Tensor:
    """Softmax attention [B heads Lq d] of `query` [B heads Lq d] over `key` and `value` [B heads Lk d].

    `mask` is bool, broadcastable to [B heads Lq Lk], True where a key may be seen, or None. Every query must
    see at least one key. With `native`, for which a machine must have `has_tiles`, a CPU uses kernels of its
    own.
    """
    if native and query.dtype in SUFFIX and serves(query) and fits(query, key, value):
        return TiledAttention.apply(query, key, value, mask)
    small = query.shape[2] * key.shape[2] <= EXPLICIT_MAX
    if query.device.type == "cpu" and query.dtype != torch.float32 and torch.is_grad_enabled() and small:
        if first_order_at_most() and not torch.compiler.is_compiling():
            return WrittenOutAttention.apply(query, key, value, mask)
        return attention_weights(query, key, mask) @ value
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether types and shapes are those that the kernels take, which look at none of them."""
    alike = query.dtype == key.dtype == value.dtype and key.shape == value.shape and query.numel() > 0
    samples = query.shape[:2] == key.shape[:2] and query.shape[3] == key.shape[3]
    return alike and samples and key.shape[2] > 0


def attention_weights(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """How much each query looks at each key, [B heads Lq Lk], rows that add up to 1; arguments as above."""
    scores = (query * query.shape[3] ** -0.5) @ key.transpose(2, 3)
    return (scores if mask is None else scores.masked_fill(~mask, -math.inf)).softmax(dim=3)


class WrittenOutAttention(torch.autograd.Function):
    """`attention` by products of matrices, which keeps its inputs and not its weights: these are made again
    in the backward pass, where one layer's are there at a time and not those of all (as Dao et al. 2022,
    arXiv:2205.14135, section 3.1, do on a GPU)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """The attention [B heads Lq d]."""
        ctx.save_for_backward(query, key, value, mask)
        return attention_weights(query, key, mask) @ value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of `query`, `key` and `value`."""
        first_order()
        query, key, value, mask = ctx.saved_tensors
        weights, scale = attention_weights(query, key, mask), query.shape[3] ** -0.5
        of_value = weights.transpose(2, 3) @ gradients[0]
        of_weights = gradients[0] @ value.transpose(2, 3)
        of_scores = torch._softmax_backward_data(of_weights, weights, 3, weights.dtype)
        return (of_scores @ key) * scale, of_scores.transpose(2, 3) @ (query * scale), of_value, None


class TiledAttention(torch.autograd.Function):
    """`attention` by the machine's own kernels; keeps its inputs and one number a query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """The attention [B heads Lq d]."""
        mask = None if mask is None else mask.expand(*query.shape[:3], key.shape[2])
        out, level = torch.ops.firstlight.attention_forward(query, key, value, mask)
        ctx.save_for_backward(query, key, value, mask, level)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of `query`, `key` and `value`."""
        first_order()
        return (*torch.ops.firstlight.attention_backward(*ctx.saved_tensors, gradients[0]), None)


class Heads(ctypes.Structure):
    """Sizes, and how far it is from one sample, head and row to the next, in the order of `heads.h`."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            *("batch", "heads", "queries", "keys", "width"),
            *(f"{of}_{step}" for of in ("query", "key", "value", "out") for step in ("batch", "head", "row")),
            *("mask_batch", "mask_head", "mask_query", "mask_key"),
        )
    )


def has_tiles(dtype: torch.dtype) -> bool:
    """Whether this machine has the kernels of `TiledAttention` for numbers of type `dtype`."""
    return dtype in SUFFIX and hasattr(kernels(), f"attention_forward_{SUFFIX[dtype]}")


def _dense(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Each [B heads L d] so that the numbers of a row lie side by side, and none twice; mostly itself."""
    return tuple(
        each if each.stride(3) == 1 and 0 not in each.stride() else each.contiguous() for each in tensors
    )


def _found(query: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the attention of `query` [B heads Lq d], of which a token's heads lie side by side, as linear
    layers read them; and for a number a query."""
    batch, heads, length, width = query.shape
    out = query.new_empty(batch, length, heads, width).transpose(1, 2)
    return out, query.new_empty(batch, heads, length, dtype=torch.float32)


def _slopes(*inputs: Tensor) -> tuple[Tensor, ...]:
    """Room for the gradients of `inputs`, which lie as those do."""
    return tuple(each.new_empty_strided(each.shape, each.stride()) for each in _dense(*inputs))


def _forward(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    query, key, value = _dense(query, key, value)
    out, level = _found(query)
    _call("attention_forward", (query, key, value, out), mask, query, key, value, mask, out, level)
    return out, level


def _backward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, level: Tensor, up: Tensor
) -> tuple[Tensor, ...]:
    query, key, value, up = _dense(query, key, value, up.to(query.dtype))
    found = _slopes(query, key, value)
    _call("attention_backward", (query, key, value, up), mask, query, key, value, mask, level, up, *found)
    return found


def _call(name: str, lie: tuple[Tensor, ...], mask: Tensor | None, *given: Tensor | None) -> None:
    """Calls a kernel on the addresses of `given`; `lie` and `mask` say how all of them lie in memory."""
    query, key = lie[:2]
    sizes = (*query.shape[:3], key.shape[2], query.shape[3])
    steps = [step for each in lie for step in each.stride()[:3]]
    shape = Heads(*sizes, *steps, *((0, 0, 0, 0) if mask is None else mask.stride()))
    addresses = [None if each is None else ctypes.c_void_p(each.data_ptr()) for each in given]
    function = getattr(kernels(), f"{name}_{SUFFIX[query.dtype]}")
    function(ctypes.byref(shape), *addresses, ctypes.c_int(torch.get_num_threads()))


def _forward_flops(query: torch.Size, key: torch.Size, *_: Any, **__: Any) -> int:
    """Of two products of matrices."""
    return 4 * math.prod(query) * key[2]


def _backward_flops(query: torch.Size, key: torch.Size, *_: Any, **__: Any) -> int:
    """Of four; that scores are made again is no work that the network asks for."""
    return 2 * _forward_flops(query, key)


operation(
    "attention_forward(Tensor query, Tensor key, Tensor value, Tensor? mask) -> (Tensor, Tensor)",
    _forward,
    lambda query, key, value, mask: _found(query),
)
operation(
    "attention_backward(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor level, Tensor up)"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    lambda query, key, value, mask, level, up: _slopes(query, key, value),
)

#: What counts FLOPs is told these, as it knows torch's own operations alone.
FLOPS = {
    torch.ops.firstlight.attention_forward: _forward_flops,
    torch.ops.firstlight.attention_backward: _backward_flops,
}
