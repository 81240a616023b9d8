"""Ranks that are threads of one process: the exchanges of `Ranks`, without the seconds they take."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from models.stages.ranks import Ranks

T = TypeVar("T")


@dataclass
class Table:
    """Where threads lay what they exchange."""

    size: int
    held: dict[int, Any] = field(default_factory=dict)
    #: Bytes of each message; appended to, as adding to a number is not one step and threads would lose some.
    sent: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=30)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """What every rank has laid there."""
        self.held[rank] = value
        self.barrier.wait()
        found = [self.held[each] for each in range(self.size)]
        self.barrier.wait()
        return found


@dataclass(frozen=True)
class Threads(Ranks):
    """A rank that is a thread."""

    table: Table = field(default_factory=lambda: Table(1))

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        return [list(row) for row in self.table.exchange(self.rank, values)]

    def swap(self, rows: Tensor) -> Tensor:
        self.table.sent.append(rows[1:].nbytes)
        return torch.stack([every[self.rank] for every in self.table.exchange(self.rank, rows.clone())])

    def collect(self, part: Tensor) -> Tensor:
        self.table.sent.append(part.nbytes * (self.size - 1))
        return torch.cat(self.table.exchange(self.rank, part.clone()))


def together(size: int, work: Callable[[Threads], T]) -> list[T]:
    """What `work` returns on each of `size` ranks; the first error of one is raised."""
    table, results, errors = Table(size), {}, []

    def run(rank: int) -> None:
        try:
            results[rank] = work(Threads(rank, size, rank, size, table))
        except BaseException as error:
            errors.append(error)
            table.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(size)]
