"""Memory that a dataset fills with a batch, and its way from a loader's worker to the main process.

Shared memory is dear where it is new: each page that is first written through a mapping is a fault, 4 us on a
virtual machine. A worker therefore fills memory of its own, which it keeps, and writes that into the shared
one by a single call, in less than half the time. In the main process what was filled is what is given. Use:
`room = handover.room((64, 3, 256, 256))`, fill it, `pixels = handover.give(room)`.
"""

import math
import os

import torch
from torch import Tensor
from torch.utils.data import get_worker_info


class Handover:
    """Gives memory to be filled, and what of it may leave the dataset; a copy elsewhere starts anew."""

    def __init__(self) -> None:
        self._kept: Tensor | None = None

    def __reduce__(self) -> tuple[type["Handover"], tuple[()]]:
        return Handover, ()

    def room(self, shape: tuple[int, ...]) -> Tensor:
        """Returns a uint8 tensor to be filled; in a worker the next call gives the same memory again."""
        if get_worker_info() is None:
            return torch.empty(shape, dtype=torch.uint8)
        size = math.prod(shape)
        if self._kept is None or len(self._kept) < size:
            self._kept = torch.empty(size, dtype=torch.uint8)
        return self._kept[:size].view(shape)

    def give(self, filled: Tensor) -> Tensor:
        """Returns a tensor like `filled`, which `room` gave: in a worker a shared one, else itself.

        Raises RuntimeError where there is too little shared memory.
        """
        return filled if get_worker_info() is None else share(filled)


def share(tensor: Tensor) -> Tensor:
    """Returns a copy of a contiguous uint8 tensor in shared memory; raises RuntimeError where it is full."""
    storage = torch.UntypedStorage._new_shared(len(tensor.view(-1)))
    shared = torch.empty(0, dtype=torch.uint8).set_(storage, 0, tensor.shape, tensor.stride())
    if torch.multiprocessing.get_sharing_strategy() != "file_descriptor":
        return shared.copy_(tensor)
    handle, size = storage._share_fd_cpu_()  # the storage's own descriptor, which it closes
    data, done = tensor.view(-1).numpy().data, 0
    try:
        while done < size:
            done += os.pwrite(handle, data[done:], done)
    except OSError as error:
        raise RuntimeError(f"unable to allocate shared memory: {error.strerror}") from error
    return shared
