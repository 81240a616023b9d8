"""Numbers that come back from the device without anybody waiting for them."""

from typing import Any

import torch
from torch import Tensor


class Readback:
    """A copy of a tensor in the host's memory, begun now and read later.

    On a GPU it is made in its turn, into page-locked memory: whoever reads it after the device was given
    more to do finds it there, or waits while the device still works. On a CPU there is nothing to copy.

    Args:
        tensor: of any shape; it must not be changed until the copy is read.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._host = tensor.to("cpu", non_blocking=True)  # torch takes page-locked memory for it by itself
        self._made: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._made = torch.cuda.Event(blocking=True)
            self._made.record()

    def values(self) -> Any:
        """The numbers, as lists in lists after the tensor's shape."""
        if self._made is not None:
            self._made.synchronize()
        return self._host.numpy().tolist()  # numpy sees the host's memory only, so that this is no wait
