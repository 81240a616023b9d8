"""Muon: momentum whose matrices are made orthogonal before they are applied.

A step of it moves every direction of a matrix equally far, where Adam's moves the few that the gradient is
made of (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; Liu et al. 2025, arXiv
2502.16982). It is for what works on tokens and on positions: the linear layers of transformers, and
convolutions. Embeddings, position maps, norms and biases are AdamW's, and so is what works on one vector a
sample (noise level, pooled text, modulation): those matrices are the widest, and most of the work, where a
batch gives them a gradient of few directions. All of it is float32 and the same on every rank, so that ranks
with whole models need not exchange anything. Where native, `models/muon.cpp` steps small
matrices.
"""

import ctypes
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.float8 import Linear
from models.kernels import kernels, room
from models.registry import ConfigError
from models.stages.optim import AdamW, OptimizerSettings

#: Of three polynomials `p(s) = a s + b s^3 + c s^5`, applied one after another: each the one that keeps
#: nearest to 1 what the ones before have made of singular values from 0.01 to 1 (Amsel et al. 2025, arXiv
#: 2505.16932, algorithm 1, solved as linear programs). Muon's own needs five rounds to come as near.
_POLYNOMIALS = ((8.0934, -23.6205, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526))


#: The shorter side of matrices that one thread steps is up to this.
_LARGEST = 256


class Muon(OptimizerSettings):
    """Muon for the linear layers of transformers and for convolutions, AdamW for all other parameters.

    An update of a matrix has the root mean square `update_rms` times the learning rate, which is about that
    of AdamW's, so that one learning rate serves both (arXiv 2502.16982, eq. 4). Models that are spread over
    ranks are refused: a rank that has some rows of a matrix cannot make it orthogonal.

    Args:
        lr: peak learning rate, of both.
        momentum: decay of the mean gradient a step, of matrices.
        update_rms: root mean square of a matrix's update at a learning rate of 1.
        beta1: AdamW's, as all that follow.
        beta2: decay of the mean squared gradient a step.
        weight_decay: a step, times the learning rate; on matrices as well, not on biases and norms.
        eps: added to the root of the mean squared gradient.
    """

    takes_parts = False

    def __init__(
        self,
        lr: float = 1e-3,
        momentum: float = 0.95,
        update_rms: float = 0.2,
        beta1: float = 0.9,
        beta2: float = 0.99,
        weight_decay: float = 0.01,
        eps: float = 1e-8,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}, but must lie in [0, 1)")
        if not (math.isfinite(update_rms) and update_rms > 0):
            raise ValueError(f"update_rms is {update_rms}, but must be a positive number, such as 0.2")
        AdamW(lr, beta1, beta2, weight_decay, eps)  # refuses what it cannot use
        self.lr = lr
        self.momentum = momentum
        self.update_rms = update_rms
        self.betas = beta1, beta2
        self.weight_decay = weight_decay
        self.eps = eps

    def build(self, network: nn.Module, native: bool = False) -> torch.optim.Optimizer:
        matrices = {
            id(module.weight): module.weight
            for module in network.modules()
            if isinstance(module, Linear | nn.Conv2d) and module.weight.requires_grad
        }
        # Imported here because it takes a second, which whoever makes pictures need not wait for.
        from torch.distributed.tensor import DTensor

        if any(isinstance(weight, DTensor) for weight in matrices.values()):
            raise ConfigError(
                "muon makes whole matrices orthogonal, and trainer.strategy spreads them over the ranks; use "
                "trainer.strategy=ddp, or the optimizer adamw"
            )
        others = AdamW(self.lr, *self.betas, self.weight_decay, self.eps)
        rest = others.of([p for p in network.parameters() if id(p) not in matrices])
        return _MuonBesideAdamW(
            list(matrices.values()), rest, self.lr, self.momentum, self.weight_decay, self.update_rms, native
        )


class _MuonBesideAdamW(torch.optim.Optimizer):
    """One optimizer of two: Muon's own group first, then those of `others`, whose state is kept here too.

    As torch's fused optimizers do, it leaves everything as it is where `found_inf` [] is 1, on the device.
    """

    _step_supports_amp_scaling = True
    found_inf: Tensor | None = None

    def __init__(
        self,
        matrices: list[Tensor],
        others: torch.optim.Optimizer,
        lr: float,
        momentum: float,
        weight_decay: float,
        update_rms: float,
        native: bool,
    ) -> None:
        super().__init__([{"params": matrices}], {"lr": lr, "weight_decay": weight_decay})
        self.momentum = momentum
        self.update_rms = update_rms
        self.native = native
        self.others = others
        # The same objects: a learning rate set here is theirs, and so is a state restored here.
        self.param_groups += others.param_groups
        others.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Applies the gradients, of `closure` where one is given; parameters without one stay as they are."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        group, refused = self.param_groups[0], self.found_inf
        given = [p for p in group["params"] if p.grad is not None]
        small = [p for p in given if _suits(p)] if self.native else []
        self._by_kernels(
            small, 1 - group["lr"] * group["weight_decay"], group["lr"] * self.update_rms, refused
        )
        taken = {id(p) for p in small}
        # A refused step takes nothing off and adds nothing, which changes no number. A tensor in either case,
        # as a number would be rounded otherwise; one of the CPU without dimensions goes with any device.
        share = torch.ones(()) if refused is None else 1 - refused
        left = 1 - group["lr"] * group["weight_decay"] * share
        by = group["lr"] * self.update_rms * share
        for alike in _of_one_shape(p for p in given if id(p) not in taken):
            directions = self._directions(alike, refused)
            updates = orthogonalised(directions, by * math.sqrt(max(directions.shape[1:])))
            for parameter, update in zip(alike, updates, strict=True):
                parameter.mul_(left).sub_(_as_weight(update, parameter))
        self.others.found_inf = refused  # type: ignore[attr-defined]
        self.others.step()
        return loss

    def _mean(self, parameter: Tensor) -> Tensor:
        """The mean gradient of a matrix, which begins as nothing; laid out as that is."""
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        elif state["momentum"].stride() != parameter.stride():
            state["momentum"] = torch.empty_like(parameter).copy_(state["momentum"])
        mean: Tensor = state["momentum"]
        return mean

    def _by_kernels(
        self, parameters: Sequence[Tensor], left: float, by: float, refused: Tensor | None
    ) -> None:
        """A step of matrices that suit, of whose weights `left` is left, with updates `by` as large."""
        if not parameters:
            return
        library = kernels()
        assert library is not None
        # What has to be copied into the layout of the weight has to live until the call is over.
        gradients = [_as_matrix(p.grad, p).contiguous() for p in parameters if p.grad is not None]
        means = [_as_matrix(self._mean(p), p) for p in parameters]
        weights = [_as_matrix(p, p) for p in parameters]
        assert all(each.is_contiguous() for each in (*means, *weights))
        work = [
            _Matrix(*three[2].shape, *(each.data_ptr() for each in three))
            for three in zip(gradients, means, weights, strict=True)
        ]
        work.sort(key=lambda matrix: -matrix.rows * matrix.columns * min(matrix.rows, matrix.columns))
        matrices = (_Matrix * len(work))(*work)
        coefficients = (number for polynomial in _POLYNOMIALS for number in polynomial)
        rule = _Rule(self.momentum, left, by, _Coefficients(*coefficients))
        count, threads = ctypes.c_int64(len(parameters)), ctypes.c_int(torch.get_num_threads())
        library.muon_room.restype = ctypes.c_int64
        own = room(library.muon_room(matrices, count, threads))
        flag = None if refused is None else ctypes.c_void_p(refused.data_ptr())
        library.muon(matrices, count, ctypes.byref(rule), flag, ctypes.c_void_p(own.data_ptr()), threads)
        torch.autograd.graph.increment_version(parameters)  # as whatever torch does in place

    def _directions(self, parameters: list[Tensor], refused: Tensor | None) -> Tensor:
        """The gradients with Nesterov's momentum `[B outputs the rest]`, of one shape; finite if refused."""
        first = parameters[0]
        made = first.new_empty(len(parameters), len(first), first[0].numel())
        for parameter, direction in zip(parameters, made, strict=True):
            assert parameter.grad is not None
            mean, gradient = self._mean(parameter), parameter.grad
            if refused is not None:
                gradient = torch.where(refused > 0, mean, gradient)
            mean.lerp_(gradient, 1 - self.momentum)
            start, end = _as_matrix(gradient, parameter), _as_matrix(mean, parameter)
            torch.lerp(start, end, self.momentum, out=direction)
        return made


class _Matrix(ctypes.Structure):
    """What `muon.cpp` is told of a weight: its sizes as a matrix, where it and what belongs to it lie."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "columns")),
        *((name, ctypes.c_void_p) for name in ("gradient", "mean", "weight")),
    )


_Coefficients = ctypes.c_float * (3 * len(_POLYNOMIALS))


class _Rule(ctypes.Structure):
    """What it is told of the step."""

    _fields_ = (
        *((name, ctypes.c_float) for name in ("momentum", "left", "by")),
        ("polynomials", _Coefficients),
    )


def _suits(weight: Tensor) -> bool:
    """Whether `muon.cpp` takes it: dense, and the work of one thread."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and min(len(weight), weight[0].numel()) <= _LARGEST
        and (weight.is_contiguous() or _is_channels_last(weight))
    )


def _as_matrix(x: Tensor, like: Tensor) -> Tensor:
    """`x`, of the shape of the weight `like`, as `[outputs, the rest]`, the rest as that lies in memory.

    So it is mostly a view. The columns' order is no matter: a matrix is made orthogonal alike in any.
    """
    return (x.permute(0, 2, 3, 1) if _is_channels_last(like) else x).flatten(1)


def _as_weight(matrix: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_as_matrix`."""
    if not _is_channels_last(like):
        return matrix.view(like.shape)
    return matrix.view(like.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)


def _is_channels_last(weight: Tensor) -> bool:
    return weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last)


def _of_one_shape(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """Parameters in lists of equal shape, which one product of matrices serves."""
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for parameter in parameters:
        by_shape.setdefault(parameter.shape, []).append(parameter)
    return list(by_shape.values())


def orthogonalised(matrices: Tensor, by: Tensor | float = 1.0) -> Tensor:
    """`matrices` float32 `[B m n]` with singular values brought near 1 (0.73 to 1.27), singular vectors kept;
    times `by` [].

    Polynomials are applied to the singular values, which are first made 1 at most by the matrix's norm. All
    powers of a matrix X are taken of `X X^T`, which is m x m for m <= n: `p(X) = (a + b X X^T + c (X X^T)^2)
    X`, so that the wide X is multiplied twice and not six times. That asks for float32 products, as TF32 or
    bfloat16 would make small eigenvalues of `X X^T` negative, which grow. Singular values below a hundredth
    of the norm stay below 0.73; of a matrix of zeros zeros remain.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalised(matrices.mT, by).mT
    gram = matrices @ matrices.mT
    # The trace is the sum of the squared singular values, so none is above 1 then.
    scale = gram.diagonal(dim1=1, dim2=2).sum(1)[:, None, None].clamp_min(torch.finfo(torch.float32).tiny)
    gram = gram / scale
    product = factor = _factor(gram, *_POLYNOMIALS[0])
    for coefficients in _POLYNOMIALS[1:]:
        gram = factor @ gram @ factor
        factor = _factor(gram, *coefficients)
        product = factor @ product
    return (product * (scale.rsqrt() * by)) @ matrices


def _factor(gram: Tensor, a: float, b: float, c: float) -> Tensor:
    """`a + b G + c G^2` of `gram` `[B m m]`: what a polynomial multiplies a matrix X of G = X X^T by."""
    factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    factor.diagonal(dim1=1, dim2=2).add_(a)
    return factor
