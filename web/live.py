"""Pictures of prompts that voters type, made by checkpoints in one thread, one after another."""

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from evaluation.arena.blind import blind_png
from models.pipeline import Pipeline
from models.sampling import Job, Sampling
from web.security import RequestError

#: Prompts that wait at most.
MAX_WAITING = 16


@dataclass(frozen=True)
class Maker:
    """A checkpoint that makes pictures while people vote, and how."""

    pipeline: Pipeline
    sampling: Sampling


class Live:
    """The makers by entrant and the thread they share; pictures are of `size` (width, height)."""

    def __init__(self, makers: Mapping[str, Maker], size: tuple[int, int]) -> None:
        self.makers = dict(makers)
        self.size = size
        self._thread = ThreadPoolExecutor(1, "arena-live")
        self._waiting = 0

    async def make(self, text: str, entrants: Sequence[str], seed: int) -> list[tuple[str, bytes]]:
        """Returns (entrant, PNG) for each, from the same noise.

        Raises RequestError where too much is waiting already, ConfigError and FloatingPointError as
        `Pipeline.generate`.
        """
        if self._waiting >= MAX_WAITING:
            raise RequestError(429, "too many prompts are waiting; try again in a minute")
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._thread, self._make, text, entrants, seed)
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """Lets what is being made end, and drops the rest."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _make(self, text: str, entrants: Sequence[str], seed: int) -> list[tuple[str, bytes]]:
        made = []
        for name in entrants:
            maker = self.makers[name]
            sampling = replace(maker.sampling, seed=seed)
            images = maker.pipeline.generate([Job(text, 0)], sampling, self.size)
            made.append((name, blind_png(images[0])))
        return made
