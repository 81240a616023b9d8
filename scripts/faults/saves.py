"""Saves that are cut short: a crash at every call that touches the file system, a kill, a full disk.

Each trial is a process that saves one more checkpoint into a folder that holds verified ones, and is stopped
on the way. Afterwards the newest checkpoint must verify, be the one before or the new one, and hold the very
numbers that were saved; and the next save must come through and leave nothing behind.

Crashes at the k-th call come from a profiler that the trial sets in itself, before or after a call into the
operating system by Python, in whichever thread writes; those inside safetensors' own code are met by the
limits on file size and by kills at random moments.
"""

import contextlib
import ctypes
import functools
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.faults.jobs import Jobs, Report
from scripts.faults.zygote import Zygote

#: Exit codes of a trial: it crashed on purpose, the disk was full, no small disk can be had here.
CRASHED, FULL, NO_DISK = 77, 78, 79
_NUMBERS = 20_000
_MODULES = ("posix", "_io", "safetensors", "safetensors._safetensors_rust", "fcntl")
#: Shares of the trials.
_SHARES = {"call": 0.5, "async": 0.2, "kill": 0.15, "limit": 0.1, "disk": 0.05}


def run_saves(jobs: Jobs, report: Report, saves: int) -> dict[str, Any]:
    """Figures of `saves` saves that were cut short: how many, and after how many no checkpoint was left."""
    tasks: list[Callable[[Zygote], dict[str, int]]] = []
    for number, (kind, share) in enumerate(_SHARES.items()):
        count = max(1, round(saves * share))
        tasks.append(functools.partial(_many, report, kind, number, count))
    figures = {"saves_crashed": 0, "without_checkpoint": 0, "saves_left_over": 0}
    for result in jobs.run(tasks):
        for name, value in result.items():
            figures[name] = figures.get(name, 0) + value
    return figures


def _many(report: Report, kind: str, number: int, count: int, zygote: Zygote) -> dict[str, int]:
    """Figures of `count` trials of one kind, all in one folder."""
    place = report.out / f"saves-{kind}"
    parent = place / "checkpoints"
    place.mkdir(parents=True)
    chance = report.random("saves", kind)
    counted = place / "calls"
    images = 0
    for _ in range(2):
        images += 1
        _run(zygote, place, parent, images, "count", str(counted))
    calls = int(counted.read_text())
    figures = {"saves_crashed": 0, "without_checkpoint": 0, "saves_left_over": 0, f"saves_{kind}": 0}
    for trial in range(count):
        images += 1
        words = {
            "call": lambda n: ["call", str(n * 2 * calls // count)],
            "async": lambda n: ["async", str(n * 2 * calls // count)],
            "kill": lambda _: ["kill", ""],
            "limit": lambda _: ["limit", str(chance.randrange(1, 5 * _NUMBERS))],
            "disk": lambda _: ["disk", str(chance.uniform(2.0, 3.2))],
        }[kind](trial)
        delay = chance.uniform(0, 0.06) if kind == "kill" else 0.0
        code, said = _run(zygote, place, parent, images, words[0], words[1], delay)
        if code == NO_DISK:
            report.say("saves: no small disk can be mounted here; those trials are left out")
            break
        if code not in (0, CRASHED, FULL, -signal.SIGKILL) and not (kind == "disk" and code == 1):
            report.fail("saves", f"{' '.join(words)}: the save ended with {code}: {said}", place)
        figures["saves_crashed"] += code != 0
        figures[f"saves_{kind}"] += code != 0
        # On its small disk a trial has looked by itself, and says so.
        looked = said if code == 1 else ""
        wrong = looked if kind == "disk" else what_is_wrong(parent, images, saved=code == 0)
        if wrong:
            figures["without_checkpoint"] += 1
            report.fail("saves", f"after {' '.join(words)}: {wrong}", place)
        if trial % 10 == 9:
            images += 1
            _run(zygote, place, parent, images, "count", str(counted))
            left = [path.name for path in parent.glob(".*")]
            figures["saves_left_over"] += len(left)
            if left or (wrong := what_is_wrong(parent, images, saved=True)):
                report.fail("saves", f"after a whole save: {wrong or left}", place)
    return figures


def _run(
    zygote: Zygote, place: Path, parent: Path, images: int, what: str, how: str, delay: float = 0.0
) -> tuple[int, str]:
    """Runs one save and waits for its end; its exit code and the last line it printed."""
    log = place / "log"
    trial = zygote.start("save", [str(parent), str(images), what, how], place, log)
    if what == "kill":
        started = time.monotonic() + 10
        while not (place / "saving").exists() and time.monotonic() < started:
            time.sleep(0.0005)
        time.sleep(delay)
        code = trial.kill()
        (place / "saving").unlink(missing_ok=True)
    else:
        ended = trial.wait(60)
        code = trial.kill() if ended is None else ended
    said = trial.said().strip().splitlines()
    return code, said[-1] if said else ""


def what_is_wrong(parent: Path, images: int, saved: bool) -> str:
    """What is wrong with the checkpoints after a save of `images` that may have been cut; "" if nothing.

    Args:
        parent: their folder.
        images: of the save.
        saved: whether the save said that it came through.
    """
    from models.checkpoint import Checkpoint, CheckpointError, newest

    found = newest(parent)
    if found is None:
        return "no checkpoint verifies"
    if saved and found.images != images:
        return f"the save came through, but the newest is {found.folder.name}"
    if found.images > images:
        return f"{found.folder.name} was never saved"
    wrong = wrong_numbers(found)
    verified = 0
    for folder in parent.glob("images-*"):
        with contextlib.suppress(CheckpointError):
            verified += bool(Checkpoint(folder).images)
    return wrong or ("" if verified >= 2 else f"only {verified} checkpoint verifies")


def wrong_numbers(checkpoint: Any) -> str:
    """Says where a checkpoint holds other numbers than its trial saved; "" if nowhere."""
    import torch

    for file, named in content(checkpoint.images)[0].items():
        tensors = checkpoint.tensors(file)
        if tensors.keys() != named.keys() or not all(torch.equal(tensors[k], named[k]) for k in named):
            return f"{checkpoint.folder.name}/{file}.safetensors holds other numbers than were saved"
    if checkpoint.document("state") != content(checkpoint.images)[1]["state"]:
        return f"{checkpoint.folder.name}/state.json holds something else than was saved"
    return ""


def content(images: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors and documents that a trial saves at `images`."""
    import torch

    ramp = torch.arange(_NUMBERS, dtype=torch.float32)
    tensors = {
        file: {"a": ramp * k + images, "b": torch.full((3, 5), float(images + k))}
        for k, file in enumerate(("weights", "ema", "optimizer"), start=1)
    }
    return tensors, {"config": {"name": "saves"}, "state": {"images_seen": images, "stage": "none"}}


def save_once(words: list[str]) -> None:
    """The trial itself: saves one checkpoint, and is stopped on the way as it is told."""
    parent, images, what, how = Path(words[0]), int(words[1]), words[2], words[3]
    if what == "disk":
        sys.exit(_on_small_disk(parent, images, float(how)))
    if what == "limit":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(how), resource.RLIM_INFINITY))
    if what == "kill":
        (parent.parent / "saving").touch()
    calls = crash_at(int(how) // 2, after=bool(int(how) % 2)) if what in ("call", "async") else crash_at(-1)
    try:
        _save(parent, images, in_background=what == "async")
    except OSError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(error, flush=True)
        os._exit(FULL)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    if what == "count":
        Path(how).write_text(str(calls[0]))


def _save(parent: Path, images: int, in_background: bool) -> None:
    """Saves as training does: in place, or in the background while the numbers are changed."""
    from models.checkpoint import save_checkpoint
    from models.checkpoint_writer import CheckpointWriter

    tensors, documents = content(images)
    if not in_background:
        save_checkpoint(parent, images, tensors, documents)
        return
    writer = CheckpointWriter(parent)
    writer.save(images, tensors, documents)
    for named in tensors.values():
        for tensor in named.values():
            tensor.zero_()
    writer.close()


def crash_at(call: int, after: bool = False) -> list[int]:
    """From now on counts the calls into the file system, and ends the process at one of them.

    Args:
        call: number of the call, from 0; negative only counts.
        after: whether the call is still made.
    """
    made = [0]

    def look(frame: Any, event: str, function: Any) -> None:
        if event not in ("c_call", "c_return", "c_exception") or not _touches_files(function):
            return
        if event == "c_call":
            made[0] += 1
            if made[0] - 1 == call and not after:
                os._exit(CRASHED)
        elif after and made[0] - 1 == call:
            os._exit(CRASHED)

    threading.setprofile(look)
    sys.setprofile(look)
    return made


def _touches_files(function: Any) -> bool:
    """Whether a built-in function belongs to what reads and writes files."""
    module = function.__module__ or type(function.__self__).__module__
    return module in _MODULES and function.__name__ not in ("getpid", "fspath", "urandom", "_exit")


def _on_small_disk(parent: Path, images: int, checkpoints: float) -> int:
    """Saves again and again on a disk that holds about so many checkpoints; the exit code.

    It is FULL if a save failed for want of space and the newest was whole after each, 1 if it was not, and
    NO_DISK where this process may not mount one.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    new_user, new_mount = 0x10000000, 0x00020000
    place = parent.parent / "disk"
    place.mkdir(exist_ok=True)
    size = int(checkpoints * (3 * 4 * (_NUMBERS + 15) + 16 * 4096))
    if libc.unshare(new_mount) and libc.unshare(new_user | new_mount):
        return NO_DISK
    options = ctypes.c_char_p(f"size={size}".encode())
    libc.mount(b"none", b"/", None, 0x4000 | 0x40000, None)  # MS_REC | MS_PRIVATE: nobody else sees it
    if libc.mount(b"tmpfs", str(place).encode(), b"tmpfs", 0, options):
        return NO_DISK
    full = False
    for turn in range(6):
        saved = True
        try:
            _save(place / "checkpoints", images + turn, in_background=False)
        except OSError as error:
            saved, full = False, True
            print(error, flush=True)
        wrong = what_is_wrong(place / "checkpoints", images + turn, saved)
        if wrong and turn > 1:
            print(wrong, flush=True)
            return 1
        if not saved and list((place / "checkpoints").glob(".*.part")):
            print("a failed save left its files on the full disk", flush=True)
            return 1
    return FULL if full else 0
