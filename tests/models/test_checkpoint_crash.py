"""Kills and full disks at every moment of a save: what is left is whole, and the next save cleans up.

A child process listens to its own audit events, and ends, or copies what a process that ended would leave,
at each thing that it does to the file system; or it is killed at random. The code under test knows nothing.
"""

import ctypes
import errno
import logging
import os
import random
import re
import resource
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from models import checkpoint as module
from models.checkpoint import Best, Checkpoint, Retention, best_of, newest, save_checkpoint, save_single_file
from models.checkpoint_writer import CheckpointWriter, SaveError

pytestmark = pytest.mark.usefixtures("quick_disk")

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.scandir", "os.listdir"}
LEFT = 9


def watched(step: Callable[[], None], work: Callable[[], Any]) -> Callable[[], None]:
    """`work` for a child process, with a call of `step` before each thing that it does to the file system."""

    def run() -> None:
        real = module.save_file

        def save_file(tensors: Any, path: Path) -> None:  # which leaves no audit event of its own
            step()
            path.write_bytes(b"\x40\0\0\0")
            step()
            real(tensors, path)

        def write_text(path: Path, text: str, encoding: str) -> None:
            with path.open("w", encoding=encoding) as file:
                step()
                file.write(text[:3])
                file.flush()
                step()
                file.write(text[3:])

        module.save_file, Path.write_text = save_file, write_text
        os.fsync = lambda handle: step()
        sys.addaudithook(lambda event, _: step() if event in EVENTS else None)
        work()

    return run


def leaving_at(k: int, work: Callable[[], Any]) -> Callable[[], None]:
    """`work`, in a child process that ends without a word at the k-th thing done to the file system."""
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if done == k:
            os._exit(LEFT)

    return watched(step, work)


def states_of(kit: Any, parent: Path, work: Callable[[], Any]) -> dict[int, Path]:
    """k -> a copy of `parent` as a process leaves it that ends at the k-th thing it does to the file system.

    What does not change anything is left out. One child process makes all the copies on its way: what has
    been written does not go away with the process that wrote it, so that no second one has to end there.
    """
    into = parent.with_name(f"{parent.name}-states")
    into.mkdir()
    done, busy, last = 0, False, None

    def step() -> None:
        nonlocal done, busy, last
        if busy:
            return
        busy, done = True, done + 1
        found = [
            (str(p), (s := p.lstat()).st_ino, s.st_size, s.st_mtime_ns) for p in sorted(parent.rglob("*"))
        ]
        if found != last:
            last = found
            shutil.copytree(parent, into / f"{done:04d}", symlinks=True)
        busy = False

    def run() -> None:
        watched(step, work)()
        nonlocal busy
        busy = True
        shutil.copytree(parent, into / f"{done + 1:04d}", symlinks=True)

    parent.mkdir(exist_ok=True)
    assert kit.run(run) == 0
    return {int(path.name): path for path in sorted(into.iterdir())}


def on_disk(parent: Path) -> dict[str, bytes | str]:
    """Everything under `parent`, with the random part of hidden names left out."""
    paths = (p for p in parent.rglob("*") if p.is_symlink() or p.is_file())
    return {
        re.sub(r"\.[0-9a-f]{8}\.part", ".part", str(p.relative_to(parent))): (
            os.readlink(p) if p.is_symlink() else p.read_bytes()
        )
        for p in paths
    }


@pytest.mark.parametrize("earlier", [[], [1], [1, 2], [1, 2, 3]])
def test_a_kill_at_any_moment_leaves_whole_checkpoints_and_the_next_save_cleans_up(
    tmp_path: Path, kit: Any, earlier: list[int]
) -> None:
    parent = tmp_path / "checkpoints"
    for images in earlier:
        kit.save(parent, images)
    before = kit.numbers(parent)
    states = states_of(kit, parent, lambda: kit.save(parent, 4))
    for state in states.values():
        after = kit.numbers(state)
        assert len(after) == len(list(state.glob("images-*")))  # nothing half made or half removed
        assert set(after) <= {*before, 4}
        assert len(after) >= len(before)  # the two newest stay until the new one is in place
        if after:
            assert after[-1] in (4, *before[-1:])
            kit.assert_whole(newest(state), after[-1])
        else:
            assert newest(state) is None
        kit.save(state, 5)
        kit.assert_whole(newest(state), 5)
        assert not list(state.glob(".*"))
        assert kit.numbers(state) == [*after[-1:], 5]
        assert os.readlink(state / "last") == "images-000000000005"
    assert len(states) > 10


def test_a_kill_at_any_moment_never_costs_the_best_or_a_milestone(tmp_path: Path, kit: Any) -> None:
    rule, parent = Retention(2, 4), tmp_path / "checkpoints"
    for images in (1, 2, 3, 4, 5, 6):
        kit.save(parent, images, rule, Best("loss", 0.5) if images == 2 else None)
    assert kit.numbers(parent) == [2, 4, 5, 6]
    seen = set()
    for state in states_of(kit, parent, lambda: kit.save(parent, 7, rule, Best("loss", 0.25))).values():
        best = best_of(state)
        assert best is not None
        marked, linked = Checkpoint(state / best[0]), Checkpoint(state / "best")
        kit.assert_whole(marked, marked.images)
        assert (marked.images, best[2]) in ((2, 0.5), (7, 0.25))
        after = kit.numbers(state)
        assert len(after) == len(list(state.glob("images-*")))  # nothing half made or half removed
        assert {4, 6} <= set(after)
        kit.assert_whole(newest(state), after[-1])
        seen.add((marked.images, linked.images, after[-1]))
        kit.save(state, 8, rule)
        assert kit.numbers(state) == sorted({linked.images, marked.images, 4, after[-1], 8})
        assert not list(state.glob(".*"))
    assert seen == {(2, 2, 6), (2, 2, 7), (7, 2, 7), (7, 7, 7)}
    assert kit.numbers(parent) == [4, 6, 7]


def test_a_process_that_ends_there_leaves_just_that(tmp_path: Path, kit: Any) -> None:
    for images in (1, 2):
        kit.save(tmp_path / "start", images)
    shutil.copytree(tmp_path / "start", tmp_path / "watched", symlinks=True)
    states = states_of(kit, tmp_path / "watched", lambda: kit.save(tmp_path / "watched", 3))
    for k in range(1, max(states), 6):
        parent = shutil.copytree(tmp_path / "start", tmp_path / str(k), symlinks=True)
        assert kit.run(leaving_at(k, lambda parent=parent: kit.save(parent, 3))) == LEFT
        assert on_disk(parent) == on_disk(states[max(n for n in states if n <= k)]), k
        kit.assert_whole(newest(parent), kit.numbers(parent)[-1])
    parent = shutil.copytree(tmp_path / "start", tmp_path / "all", symlinks=True)
    assert kit.run(leaving_at(max(states), lambda: kit.save(parent, 3))) == 0
    assert k > 30


@pytest.mark.parametrize("wait", [True, False])
def test_a_kill_out_of_the_blue_costs_what_was_being_written_and_nothing_else(
    tmp_path: Path, kit: Any, wait: bool
) -> None:
    draw, first = random.Random(wait), 1
    lag = 1 if wait else 2
    for _ in range(15):
        read, write = os.pipe()

        def save_on(first: int = first, write: int = write) -> None:
            writer = CheckpointWriter(tmp_path)
            for images in range(first, first + 10_000):
                os.write(write, images.to_bytes(4, "big"))
                writer.save(images, *kit.content(images), wait)

        child = kit.start(save_on)
        for _ in range(draw.randint(1, 6)):
            began = int.from_bytes(os.read(read, 4), "big")
        time.sleep(draw.uniform(0, 0.01))
        kit.kill(child)
        os.close(write)
        while said := os.read(read, 4):
            began = int.from_bytes(said, "big")
        os.close(read)
        found = newest(tmp_path)
        if found is None:
            assert began <= lag
            continue
        kit.assert_whole(found, found.images)
        assert began - lag <= found.images <= began
        assert len(kit.verified(tmp_path)) >= min(found.images, 2)
        first = found.images + 1
    assert first > 15
    kit.save(tmp_path, first)
    assert len(kit.listing(tmp_path)) == 2


def test_a_full_disk_at_any_moment_leaves_nothing_half_behind(tmp_path: Path, kit: Any) -> None:
    error = OSError(errno.ENOSPC, "No space left on device")
    places = set()
    for k in range(1, 1000):
        parent = tmp_path / str(k)
        kit.save(parent, 1)
        kit.save(parent, 2)
        with kit.failing_at(k, error) as calls, suppress(OSError):
            kit.save(parent, 3, Retention(), Best("loss", 0.5))
        if len(calls) < k:
            break
        places.add(calls[k - 1])
        after = kit.numbers(parent)
        assert 2 in after
        assert len(after) >= 2
        kit.assert_whole(newest(parent), 3 if 3 in after else 2)
        assert not list(parent.glob(".images-000000000003.*"))
        assert best_of(parent) in (None, ("images-000000000003", "loss", 0.5))
        shutil.rmtree(parent)
    else:
        pytest.fail("the save never finished")
    assert {"save_file", "fsync", "rename", "write_text", "symlink", "replace", "safe_open"} <= places


def test_what_safetensors_says_of_a_full_disk_is_an_oserror_with_file_need_and_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kit: Any
) -> None:
    kit.save(tmp_path, 1)

    def full(*_: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(
        OSError,
        match=r"images-000000000002: weights.safetensors could not be written: .*No space left.*; "
        r"it takes 8\.0 MiB and [\d,]+\.\d MiB are free; make room .* the checkpoints before it are whole$",
    ):
        save_checkpoint(tmp_path, 2, {"weights": {"a": torch.zeros(2**21)}}, {})
    with pytest.raises(OSError, match=r"model.safetensors: could not be written: .* space"):
        save_single_file(tmp_path / "model.safetensors", {"a": torch.zeros(1)}, {})
    assert kit.listing(tmp_path) == ["images-000000000001"]


@pytest.mark.parametrize("limit", [0, 1, 20, 150, 300, 700, 4_096, 65_536, 399_999])
def test_a_write_that_the_system_refuses_half_way_leaves_nothing_behind(
    tmp_path: Path, kit: Any, limit: int
) -> None:
    kit.save(tmp_path, 1)
    tensors, documents = kit.content(2)
    tensors["weights"]["a.weight"] = torch.zeros(100_000)
    writer = CheckpointWriter(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match=r"images-000000000002: .*could not be written: .*File too large"):
            save_checkpoint(tmp_path, 2, tensors, documents)
        if limit < 200:  # a document that does not fit, after tensors that need no room
            with pytest.raises(OSError, match=r"could not be written: .*File too large"):
                save_checkpoint(tmp_path, 2, {}, {"config": {"long": "x" * 200}})
        with pytest.raises(SaveError, match="File too large"):
            writer.save(2, tensors, documents, wait=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert kit.listing(tmp_path) == ["images-000000000001"]
    kit.assert_whole(newest(tmp_path), 1)
    writer.save(2, tensors, documents, wait=True)
    writer.close()
    assert kit.numbers(tmp_path) == [1, 2]


NOT_PERMITTED = 77


def mount_small(folder: Path, size: int) -> None:
    """Mounts a memory disk of `size` bytes that only this process sees; ends it where it may not."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    new_mounts, new_users, private = 0x20000, 0x10000000, 0x44000
    if libc.unshare(new_mounts if user == 0 else new_mounts | new_users):
        os._exit(NOT_PERMITTED)
    if user:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path("/proc/self", name).write_text(text)
    options = f"size={size}".encode()
    if libc.mount(b"none", b"/", None, private, None) or libc.mount(
        b"none", os.fsencode(folder), b"tmpfs", 0, options
    ):
        os._exit(NOT_PERMITTED)


def test_a_disk_that_is_full_after_any_page_costs_nothing_and_the_next_attempt_succeeds(
    tmp_path: Path, kit: Any
) -> None:
    page = resource.getpagesize()
    parent, filler = tmp_path / "checkpoints", tmp_path / "filler"

    def work() -> None:
        mount_small(tmp_path, 64 * page)
        logging.disable()
        kit.save(parent, 1)
        kit.save(parent, 2)
        writer, failed = CheckpointWriter(parent, retry_images=1, max_failures=1_000), 0
        for pages in range(6):
            with suppress(OSError), filler.open("wb", 0) as file:
                while True:
                    file.write(bytes(page))
            filler.write_bytes(bytes(filler.stat().st_size - pages * page)) if pages else None
            writer.save(3, *kit.content(3), best=Best("loss", 0.5))
            writer.save(3, *kit.content(3))
            writer._collect(wait=True, strict=False)
            failed = writer.retry.failures
            if not failed:
                break
            assert "No space left on device" in writer._reason, writer._reason
            assert "MiB are free; make room" in writer._reason, writer._reason
            assert kit.numbers(parent) == [1, 2]
            kit.assert_whole(newest(parent), 2)
            assert not list(parent.glob(".*")), list(parent.glob(".*"))
            assert writer.due(2**40)
        assert pages > 2, pages
        filler.unlink()
        kit.save(parent, 4)
        kit.assert_whole(newest(parent), 4)
        writer.close()
        big = {"weights": {"a": torch.zeros(64 * page)}}
        with pytest.raises(
            OSError, match=r"00005: weights.safetensors could not be written.* takes 1\.0 MiB and 0\.\d MiB"
        ):
            save_checkpoint(parent, 5, big, {})
        kit.assert_whole(newest(parent), 4)
        assert not list(parent.glob(".*"))

    code = kit.run(work)
    if code == NOT_PERMITTED:
        pytest.skip("a file system cannot be mounted here")
    assert code == 0
