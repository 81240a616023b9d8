"""The processes that train one model together: who this one is, and how they come to agree.

A rank is a process with its share of every global batch. Everything that must be the same on all of them (how
to compute, which checkpoint to take up, whether a step is applied, when to stop) is agreed here, at moments
where every rank asks. One process alone is `Ranks.alone()`, whose answers are immediate.

Use: `with Ranks.join(timeout=1800) as ranks: losses = ranks.gather([loss])`.
"""

import faulthandler
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

#: What a launcher tells each process; torchrun sets the same.
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class RankError(OSError):
    """Another rank is gone, or does not answer."""


@dataclass(frozen=True)
class Ranks:
    """One of `size` processes: number `rank` of all, `local_rank` of the `local_size` on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @staticmethod
    def alone() -> "Ranks":
        """A process that trains by itself."""
        return Ranks()

    @staticmethod
    @contextmanager
    def join(timeout: float) -> "Iterator[Ranks]":
        """This process's place among those its launcher started; alone where there was none.

        Args:
            timeout: seconds after which a rank that does not answer ends the run.

        Raises:
            RankError: the others could not be reached.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            yield Ranks.alone()
            return
        rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank)
        ranks = Ranks(rank, size, local_rank, local_size)
        with ranks._named_errors():
            distributed.init_process_group(backend, timeout=timedelta(seconds=timeout))
        try:
            yield ranks
        finally:
            distributed.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this is the rank that prints, logs and saves."""
        return self.rank == 0

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Every rank's `values`, in the order of the ranks; each rank gives as many.

        Raises:
            RankError: a rank is gone or does not answer.
        """
        if self.size == 1:
            return [list(values)]
        mine = torch.tensor(values, dtype=torch.float64)
        every = torch.empty((self.size, len(values)), dtype=torch.float64)
        with self._named_errors():
            distributed.all_gather_into_tensor(every.view(-1), mine)
        return every.tolist()

    def gather_tensor(self, mine: Tensor) -> Tensor:
        """The vectors of all ranks, float32 of any lengths, one after another in the order of the ranks."""
        if self.size == 1:
            return mine
        lengths = [int(length) for (length,) in self.gather([len(mine)])]
        padded = torch.zeros(max(lengths))
        padded[: len(mine)] = mine.float().cpu()
        every = torch.empty((self.size, max(lengths)))
        with self._named_errors():
            distributed.all_gather_into_tensor(every.view(-1), padded)
        return torch.cat([row[:length] for row, length in zip(every, lengths, strict=True)])

    def swap(self, rows: Tensor) -> Tensor:
        """Row `rank` of every rank's `rows` [R N], as the ranks are ordered: [R N]; RankError as `gather`."""
        if self.size == 1:
            return rows
        swapped = torch.empty_like(rows)
        with self._named_errors():
            distributed.all_to_all_single(swapped, rows)
        return swapped

    def collect(self, part: Tensor) -> Tensor:
        """The `part` [N] of every rank, in the order of the ranks: [R * N]; RankError as `gather`."""
        if self.size == 1:
            return part
        every = part.new_empty(self.size * len(part))
        with self._named_errors():
            distributed.all_gather_into_tensor(every, part)
        return every

    def share(self, value: Any) -> Any:
        """The first rank's `value`, made of JSON values; the others' own is not looked at.

        Raises:
            RankError: a rank is gone or does not answer.
        """
        if self.size == 1:
            return value
        data = bytearray(json.dumps(value).encode()) if self.first else bytearray()
        length = int(self.gather([len(data)])[0][0])
        text = (
            torch.frombuffer(data, dtype=torch.uint8)
            if self.first
            else torch.empty(length, dtype=torch.uint8)
        )
        with self._named_errors():
            distributed.broadcast(text, 0)
        return json.loads(bytes(text.numpy()))

    def wait(self) -> None:
        """Returns once every rank has come here; RankError as `gather`."""
        self.gather([0.0])

    def beat(self, step: int) -> None:
        """Tells the others that this rank has come to `step`, for the message if it stops there."""
        if self.size > 1:
            _store().set(f"firstlight/step/{self.rank}", str(step))

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise self.explain(error) from error

    def explain(self, error: RuntimeError) -> RankError:
        """What a failed exchange says about the other ranks, as an error of one line."""
        text = str(error).splitlines()[0]
        if "imed out" not in text and "imeout" not in text:
            return RankError(
                f"rank {self.rank} of {self.size} lost contact with the others ({text[:160]}); "
                "the one that ended first says why; then continue with resume=true"
            )
        faulthandler.dump_traceback()
        return RankError(
            f"rank {self.rank} of {self.size} waited in vain: {self._late()}; look at that process and its "
            "machine (stopped, swapping, a slow disk?), or raise trainer.timeout; continue with resume=true"
        )

    def _late(self) -> str:
        """Which ranks are behind, by what they last told."""
        try:
            store = _store()
            store.set_timeout(timedelta(seconds=2))
            steps = {r: int(store.get(f"firstlight/step/{r}")) for r in range(self.size) if r != self.rank}
        except RuntimeError:
            return "rank 0, which keeps the others' news, does not answer"
        last = min(steps.values())
        late = ", ".join(f"rank {rank}" for rank, step in steps.items() if step == last)
        return f"{late} was last heard of at step {last}"


def _store() -> distributed.Store:
    store = distributed.distributed_c10d._get_default_store()
    assert isinstance(store, distributed.Store)
    return store
