"""What the tests of checkpoints share: small states that tell which one they are, and child processes."""

import contextlib
import os
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models import checkpoint as module
from models.checkpoint import Checkpoint, CheckpointError, save_checkpoint

#: Everything a save does to the disk, as Python sees it.
POINTS = [
    *((module, name) for name in ("save_file", "_sha256", "safe_open")),
    *((os, name) for name in ("fsync", "mkdir", "open", "scandir", "rename", "unlink", "rmdir", "symlink")),
    *((Path, name) for name in ("mkdir", "write_text", "rename", "replace", "iterdir", "glob", "stat")),
    (shutil, "rmtree"),
]


class Kit:
    """Saves checkpoints whose content follows from their number, and looks at what is on the disk."""

    @staticmethod
    def content(images: int) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Any]]]:
        """Small tensors and documents that tell which checkpoint they belong to."""
        tensors = {
            "weights": {"a.weight": torch.full((2, 3), float(images)), "a.step": torch.tensor(images)},
            "ema": {"a.weight": torch.full((2, 3), images + 0.5, dtype=torch.bfloat16)},
        }
        return tensors, {"config": {"backbone": {"name": "unet"}}, "state": {"images_seen": images}}

    def save(self, parent: Path, images: int, *rules: Any) -> Path:
        """Saves the content of `images`; `rules` are a retention and a best."""
        return save_checkpoint(parent, images, *self.content(images), *rules)

    def assert_whole(self, checkpoint: Checkpoint | None, images: int) -> None:
        """Bit for bit the content of `images`."""
        assert checkpoint is not None
        assert checkpoint.images == images
        tensors, documents = self.content(images)
        for name, wanted in tensors.items():
            found = checkpoint.tensors(name)
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[k], wanted[k]) and found[k].dtype == wanted[k].dtype for k in wanted)
        assert {name: checkpoint.document(name) for name in documents} == documents

    @staticmethod
    def verified(parent: Path) -> list[str]:
        """Names of the folders that verify."""
        names = []
        for folder in sorted(parent.glob("images-*")):
            with contextlib.suppress(CheckpointError):
                names.append(Checkpoint(folder).folder.name)
        return names

    def numbers(self, parent: Path) -> list[int]:
        """Images of the folders that verify, fewest first."""
        return sorted(Checkpoint(parent / name).images for name in self.verified(parent))

    @staticmethod
    def listing(parent: Path) -> list[str]:
        """All names there are but the link to the last one."""
        return sorted(p.name for p in parent.iterdir() if p.name != "last")

    @staticmethod
    def flip(path: Path, bit: int = 80) -> None:
        """Turns one bit of a file."""
        data = bytearray(path.read_bytes())
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)

    @staticmethod
    def start(work: Callable[[], Any]) -> int:
        """The number of a child process that does `work` and ends with 0, or with 1 and a traceback."""
        sys.stdout.flush()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the child uses none of the other threads
            child = os.fork()
        if child:
            return child
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(code)

    def run(self, work: Callable[[], Any]) -> int:
        """The exit code of a child process that did `work`; negative where a signal ended it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.start(work), 0)[1])

    @staticmethod
    @contextlib.contextmanager
    def failing_at(k: int, error: OSError) -> Iterator[list[str]]:
        """The k-th call of those that touch the disk raises `error`; gives the names of those called."""
        calls: list[str] = []

        def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                calls.append(name)
                if len(calls) == k:
                    raise error
                return real(*args, **kwargs)

            return call

        with pytest.MonkeyPatch.context() as patch:
            for owner, name in POINTS:
                patch.setattr(owner, name, wrap(name, getattr(owner, name)))
            yield calls

    @staticmethod
    def kill(child: int) -> None:
        """SIGKILL, and waits."""
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.fixture(scope="session")
def kit() -> Kit:
    """Helpers for checkpoints."""
    return Kit()


@pytest.fixture
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test can cut the power, so fsync need not wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
