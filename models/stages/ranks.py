"""The processes that train one model together: who this one is, and how they come to agree.

A rank is a process with its share of every global batch. Everything that must be the same on all of them (how
to compute, which checkpoint to take up, whether a step is applied, when to stop) is agreed here, at moments
where every rank asks. One process alone is `Ranks.alone()`, whose answers are immediate.

Use: `with Ranks.join(timeout=1800, connect_timeout=300) as ranks: losses = ranks.gather([loss])`.
"""

import faulthandler
import json
import os
import socket
import time
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
    def join(timeout: float, connect_timeout: float) -> "Iterator[Ranks]":
        """This process's place among those its launcher started; alone where there was none.

        Args:
            timeout: seconds after which a rank that does not answer ends the run.
            connect_timeout: seconds in which all ranks have to meet.

        Raises:
            RankError: the others could not be reached, or the launcher did not say where they are.
        """
        ranks = Ranks.placed()
        if ranks.size == 1:
            yield ranks
            return
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(ranks.local_rank)
        store = ranks._meet(connect_timeout)
        store.set_timeout(timedelta(seconds=timeout))
        with ranks._named_errors():
            distributed.init_process_group(
                backend, store=store, rank=ranks.rank, world_size=ranks.size,
                timeout=timedelta(seconds=timeout),
            )  # fmt: skip
        try:
            yield ranks
        finally:
            distributed.destroy_process_group()

    @staticmethod
    def placed() -> "Ranks":
        """This process's place by its environment, before it has met anyone.

        Raises:
            RankError: the environment names a size and not all of the rest, or no numbers.
        """
        if os.environ.get("WORLD_SIZE", "1") == "1":
            return Ranks.alone()
        missing = [name for name in VARIABLES if not os.environ.get(name)]
        if missing:
            raise RankError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} not set; start all ranks with torchrun, or one "
                "process with trainer.devices=N, which starts the others"
            )
        numbers = {name: os.environ.get(name, "") for name in VARIABLES if name != "MASTER_ADDR"}
        numbers["LOCAL_WORLD_SIZE"] = os.environ.get("LOCAL_WORLD_SIZE", numbers["WORLD_SIZE"])
        for name, value in numbers.items():
            if not value.isdecimal():
                raise RankError(f"the environment's {name} is {value!r}, but must be a number")
        rank, size, local_rank, local_size = (
            int(numbers[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        )
        if rank >= size:
            raise RankError(f"the environment's RANK is {rank}, but ranks of WORLD_SIZE={size} are below it")
        return Ranks(rank, size, local_rank, local_size)

    def _meet(self, seconds: float) -> distributed.Store:
        """What all ranks have come to, which keeps news for all.

        torch by itself waits as long for ranks that never came as for one that is slow, and names none.
        """
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        deadline = time.monotonic() + seconds
        # Torchrun keeps such a store itself, the same one after a restart.
        kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        opens = self.first and not kept
        if not opens:
            self._reach(host, port, seconds)
        try:
            whole = distributed.TCPStore(
                host, port, None if kept else self.size, is_master=opens,
                timeout=timedelta(seconds=seconds), wait_for_workers=False,
            )  # fmt: skip
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = distributed.PrefixStore(f"firstlight/{attempt}", whole)
            store.set(f"here/{self.rank}", "")
            store.add("here", 1)
            while store.add("here", 0) < self.size:
                if time.monotonic() > deadline:
                    raise RankError(self._absent(store, seconds))
                time.sleep(0.1)
        except RuntimeError as error:
            raise RankError(self._unmet(error, f"{host}:{port}")) from error
        return store

    def _reach(self, host: str, port: int, seconds: float) -> None:
        """Returns once somebody listens at rank 0's address; RankError after so many seconds."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                socket.create_connection((host, port), max(0.1, deadline - time.monotonic())).close()
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    raise RankError(
                        f"rank {self.rank} of {self.size} could not reach rank 0 at {host}:{port} within "
                        f"{seconds:.0f} s ({error.strerror or error}); see whether MASTER_ADDR and "
                        "MASTER_PORT are its own, whether it runs, and whether a firewall is between"
                    ) from error
            time.sleep(0.1)

    def _absent(self, store: distributed.Store, seconds: float) -> str:
        """Who has not come."""
        absent = [rank for rank in range(self.size) if not store.check([f"here/{rank}"])]
        verb, they = ("has", "it was") if len(absent) == 1 else ("have", "they were")
        return (
            f"rank {self.rank} of {self.size} waited {seconds:.0f} s at the start, but {listed(absent)} "
            f"{verb} not come; see whether {they} started and what it says, or raise trainer.connect_timeout"
        )

    def _unmet(self, error: RuntimeError, address: str) -> str:
        """Why the meeting place could not be opened, or is gone."""
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            return (
                f"rank {self.rank} of {self.size} cannot listen at {address}: another process does; choose "
                "another MASTER_PORT"
            )
        return (
            f"rank {self.rank} of {self.size} met rank 0 at {address}, which has ended since or does not "
            f"answer ({str(error).splitlines()[0][:160]}); rank 0 says why"
        )

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

    def gather_text(self, text: str) -> list[str]:
        """Every rank's `text`, in the order of the ranks; RankError as `gather`."""
        data = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8)
        lengths = [int(length) for (length,) in self.gather([len(data)])]
        padded = torch.nn.functional.pad(data, (0, max(lengths) - len(data)))
        rows = self.collect(padded).view(self.size, -1)
        return [bytes(row[:length].numpy()).decode() for row, length in zip(rows, lengths, strict=True)]

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


def listed(ranks: Sequence[int]) -> str:
    """`rank 1`, or `ranks 1, 2`."""
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _store() -> distributed.Store:
    store = distributed.distributed_c10d._get_default_store()
    assert isinstance(store, distributed.Store)
    return store
