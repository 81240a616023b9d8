"""Networks called on portions of a fixed number of rows, so that no row depends on how many come with it.

Matrix and convolution kernels are chosen by the shape of the batch and by the number of threads, and sum in
another order for another choice: the same row then differs in its last bits, and now and then by a level in a
picture. On a CPU every call is therefore made with one fixed number of rows, the last ones repeated where
there are fewer, and on one thread; several portions are computed at a time instead. The number of rows
depends on the size of a row's content alone. Used by `models.pipeline`.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from models.conditioning import Conditioning

#: Positions of latents, or pixels of a picture, that a portion has about; more at once is not faster.
POSITIONS = 2_048
PIXELS = 16_384
TEXTS = 8


def rows_for(limit: int, height: int, width: int) -> int:
    """How many rows of `height * width` a portion has."""
    return max(1, limit // (height * width))


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """None; torch computes on `count` threads inside, 0 being as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def one_thread() -> AbstractContextManager[None]:
    """A context in which torch computes on one thread, so that no sum depends on how many there are."""
    return on_threads(1)


class Portions:
    """Calls networks on portions, as many at a time as torch has threads; without gradients.

    Args:
        autocast: context in which the networks run.
    """

    def __init__(self, autocast: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        self.autocast = autocast

    def __call__(self, rows: int, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """`function(*inputs)` `[B ...]`, called on `rows` rows at a time; `inputs` are `[B ...]` each."""
        count, threads = len(inputs[0]), torch.get_num_threads()

        def call(first: int) -> Tensor:
            # Threads have settings of their own: nothing of the caller's holds in them.
            torch.set_num_threads(1)
            with torch.no_grad(), self.autocast():
                parts = [_filled(each[first : first + rows], rows) for each in inputs]
                return function(*parts)[: count - first]

        starts = range(0, count, rows)
        try:
            with ThreadPoolExecutor(min(threads, len(starts))) as pool:
                return torch.cat(list(pool.map(call, starts)))
        finally:
            torch.set_num_threads(threads)


def _filled(part: Tensor, rows: int) -> Tensor:
    """A copy of `part` with its last row repeated to `rows`, always laid out in the same way."""
    whole = part.new_empty((rows, *part.shape[1:]))
    whole[: len(part)] = part
    whole[len(part) :] = part[-1:]
    return whole


class PortionedBackbone:
    """A backbone that is called on portions.

    Args:
        backbone: `[B C h w], [B], Conditioning -> [B C h w]`.
        portions: calls it.
    """

    def __init__(
        self, backbone: Callable[[Tensor, Tensor, Conditioning], Tensor], portions: Portions
    ) -> None:
        self.backbone = backbone
        self.portions = portions

    def __call__(self, x: Tensor, c_noise: Tensor, conditioning: Conditioning) -> Tensor:
        """The output `[B C h w]`."""
        picture = () if conditioning.image is None else (conditioning.image,)

        def call(x: Tensor, c_noise: Tensor, *parts: Tensor) -> Tensor:
            return self.backbone(x, c_noise, Conditioning(*parts))

        given = (conditioning.tokens, conditioning.mask, conditioning.pooled, *picture)
        return self.portions(rows_for(POSITIONS, *x.shape[2:]), call, x, c_noise, *given)
