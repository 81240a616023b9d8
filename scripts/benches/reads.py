"""Counts what would make the host wait for a GPU, on any machine.

A number of a tensor can be read by an operator, which torch's dispatcher sees, or by a method that on a CPU
needs none (`tolist`, `cpu`), which Python's side sees. Operators whose result has as many elements as some
other tensor has ones wait as well. A copy that was begun before and is read from the host's memory
(models/stages/readback.py) waits for nothing and is none of these.
"""

from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_ATEN = torch.ops.aten
_READING = {
    _ATEN._local_scalar_dense.default, _ATEN.equal.default, _ATEN.nonzero.default,
    _ATEN.masked_select.default, _ATEN._unique2.default,
}  # fmt: skip
_INDEXING = {_ATEN.index.Tensor, _ATEN.index_put.default, _ATEN.index_put_.default}
_METHODS = {Tensor.tolist, Tensor.cpu}


class Reads:
    """A context; `count` is the number of reads within it so far, by this thread."""

    def __init__(self) -> None:
        self.count = 0
        self._modes = ExitStack()

    def __enter__(self) -> Self:
        self._modes.enter_context(_Methods(self))
        self._modes.enter_context(_Operators(self))
        return self

    def __exit__(self, *_: object) -> None:
        self._modes.close()


class _Operators(TorchDispatchMode):
    def __init__(self, reads: Reads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.reads.count += function in _READING or (function in _INDEXING and any(map(_masks, args[1])))
        return function(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, reads: Reads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.reads.count += function in _METHODS
        return function(*args, **(kwargs or {}))


def _masks(index: Tensor | None) -> bool:
    """Whether an index picks by truth, so that how much it picks has to be read."""
    return index is not None and index.dtype in (torch.bool, torch.uint8)
