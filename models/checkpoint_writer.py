"""Saves checkpoints while training goes on.

A save copies the state into buffers on the CPU, which is all that training waits for; a thread writes them.
There is at most one save in flight and one set of buffers, so that memory is bounded by one more state. A
write that fails (a full disk) costs nothing but a warning: training goes on, the next attempt comes after a
growing number of images, and only so many failures in a row are an error.

    writer = CheckpointWriter(parent, Retention(last=3))
    while training:
        step()
        writer.check()
        if crossed(interval) or writer.due(images_seen):
            writer.save(images_seen, tensors, documents)
    writer.save(images_seen, tensors, documents, wait=True)
    writer.close()
"""

import json
import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.checkpoint import KEEP_TWO, Best, Retention, Tensors, save_checkpoint

logger = logging.getLogger(__name__)


class SaveError(OSError):
    """A checkpoint could not be written; those before it are whole."""


class Retry:
    """When to try again after failures: after `first_images`, then twice as many, and so on.

    Args:
        first_images: images between the first failure and the next attempt, above 0.
        limit: failures in a row that are too many, above 0.

    Raises:
        ValueError: out of range.
    """

    def __init__(self, first_images: int = 1_000, limit: int = 5) -> None:
        if first_images < 1 or limit < 1:
            raise ValueError(f"first_images and limit are {first_images} and {limit}, but must be above 0")
        self.first_images = first_images
        self.limit = limit
        #: Failures in a row.
        self.failures = 0
        #: Images seen at which to try again; None where nothing has failed.
        self.at: int | None = None

    def failed(self, images: int) -> None:
        """Counts a failure at `images` seen."""
        self.at = images + self.first_images * 2**self.failures
        self.failures += 1

    def succeeded(self) -> None:
        """Forgets the failures."""
        self.failures, self.at = 0, None

    def due(self, images: int) -> bool:
        """Whether to try again at `images` seen."""
        return self.at is not None and images >= self.at

    @property
    def exhausted(self) -> bool:
        """Whether there were too many failures in a row."""
        return self.failures >= self.limit


class CheckpointWriter:
    """Saves to one folder, in the background or in place. Its methods belong to one thread.

    Args:
        parent: folder of a stage's checkpoints.
        retention: which older checkpoints stay; None for all of them.
        retry_images: images from the first failure to the next attempt; doubled with each failure in a row.
        max_failures: failures in a row that end the training.
    """

    def __init__(
        self,
        parent: Path,
        retention: Retention | None = KEEP_TWO,
        retry_images: int = 1_000,
        max_failures: int = 5,
    ) -> None:
        self.parent = parent
        self.retention = retention
        self.retry = Retry(retry_images, max_failures)
        self._flying: tuple[int, Future[Path]] | None = None
        self._buffers: dict[str, dict[str, Tensor]] = {}
        self._reason = ""

    def save(
        self,
        images: int,
        tensors: Mapping[str, Tensors],
        documents: Mapping[str, Mapping[str, Any]],
        wait: bool = False,
        best: Best | None = None,
    ) -> Path | None:
        """The new folder with `wait`; None without, when the caller may change `tensors` at once.

        The save before, if it is still in flight, is waited for first.

        Args:
            images: training images seen.
            tensors: file name without suffix -> named tensors, on any device.
            documents: file name without suffix -> JSON content.
            wait: write it in place, and raise where that fails.
            best: given where this checkpoint is the best so far.

        Raises:
            SaveError: with `wait`, it could not be written; without, saves before it have failed too often.
        """
        self._collect(wait=True, strict=not wait)
        if wait:
            try:
                folder = save_checkpoint(self.parent, images, tensors, documents, self.retention, best)
            except OSError as error:
                self._failed(images, error)
                raise SaveError(self._reason) from error
            self.retry.succeeded()
            return folder
        self._buffers = snapshot(tensors, self._buffers)
        plain = json.loads(json.dumps(documents))
        # A thread for this save alone. One that lives on after it computed in parallel keeps workers of its
        # own, and where there are more of them than cores OpenMP no longer waits actively: from its first
        # save to its end every step of a training on two threads took 1.5 to 1.8 times as long.
        thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        work = (self.parent, images, self._buffers, plain, self.retention, best)
        try:
            self._flying = images, thread.submit(save_checkpoint, *work)
        except RuntimeError as error:  # the system has no thread to give: a failure like any other
            self._failed(images, OSError(str(error)))
            logger.warning("%s; training goes on", self._reason)
        thread.shutdown(wait=False)
        return None

    def due(self, images: int) -> bool:
        """Whether the last save failed and should be tried again at `images` seen."""
        self._collect(wait=False, strict=False)
        return self._flying is None and self.retry.due(images)

    def check(self) -> None:
        """Takes note of a save that has ended; costs nothing, so that it can be called at every step.

        Raises:
            SaveError: saves have failed too often in a row.
        """
        self._collect(wait=False, strict=True)

    def close(self) -> None:
        """Waits for the save in flight. Failures are logged, not raised; `save` with `wait` before raises."""
        try:
            self._collect(wait=True, strict=False)
        except Exception:
            logger.exception("%s: the last save failed", self.parent)
        self._buffers = {}

    def _collect(self, wait: bool, strict: bool) -> None:
        """Counts the outcome of the save in flight, if it has ended or is waited for."""
        if self._flying is not None and (wait or self._flying[1].done()):
            (images, job), self._flying = self._flying, None
            try:
                job.result()
                self.retry.succeeded()
            except OSError as error:
                self._failed(images, error)
                logger.warning("%s; training goes on", self._reason)
        if strict and self.retry.exhausted:
            raise SaveError(self._reason)

    def _failed(self, images: int, error: OSError) -> None:
        self.retry.failed(images)
        self._reason = f"{error} (failure {self.retry.failures} of {self.retry.limit} in a row)"


@torch.inference_mode(False)  # else the buffers could not be written to outside of that mode
@torch.no_grad()
def snapshot(
    tensors: Mapping[str, Tensors], buffers: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, dict[str, Tensor]]:
    """Copies of `tensors`, contiguous on the CPU, in those of `buffers` that fit and new ones otherwise."""
    copies: dict[str, dict[str, Tensor]] = {}
    devices = set()
    for file, named in tensors.items():
        copies[file] = {}
        for name, tensor in named.items():
            buffer = buffers.get(file, {}).get(name)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            copies[file][name] = buffer.copy_(tensor, non_blocking=tensor.is_cuda)
            if tensor.is_cuda:
                devices.add(tensor.device)
    for device in devices:
        torch.cuda.synchronize(device)
    return copies
