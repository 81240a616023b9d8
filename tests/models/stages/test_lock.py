"""One run, one process: who holds the lock is told, and a dead holder's lock is free."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from models.stages.lock import LOCK, LockError, run_lock

HOLDER = """
import sys, time
from pathlib import Path
from models.stages.lock import run_lock
with run_lock(Path(sys.argv[1]), [1, 2]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_held_lock_says_by_whom_and_a_dead_one_is_free(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        content = json.loads((tmp_path / LOCK).read_text())
        assert (content["pid"], content["pids"]) == (holder.pid, [1, 2])
        told = rf"in use by process {holder.pid} on .*, for \d+ s; wait for it"
        with pytest.raises(LockError, match=told), run_lock(tmp_path, [0]):
            pass
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    with run_lock(tmp_path, [5]):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert (tmp_path / LOCK).read_text() == ""


def test_who_holds_it_sweeps_what_a_killed_one_left(tmp_path: Path) -> None:
    parent = tmp_path / "diffusion" / "checkpoints"
    for name in (".images-000000000008.old.part", ".images-000000000016.0a1b2c3d.part"):
        (parent / name).mkdir(parents=True)
        (parent / name / "weights.safetensors").write_bytes(b"half")
    (parent / ".best.json.part").write_text("{")
    (parent / "images-000000000016").mkdir()
    (parent / "notes.part").mkdir()
    with run_lock(tmp_path, [1]):
        assert sorted(path.name for path in parent.iterdir()) == ["images-000000000016", "notes.part"]
        staged = parent / ".images-000000000024.11111111.part"
        staged.mkdir()
        with pytest.raises(LockError), run_lock(tmp_path, [2]):
            pass
        assert staged.is_dir()  # it belongs to whoever holds the lock


def test_a_lock_whose_content_is_damaged_is_still_one(tmp_path: Path) -> None:
    with run_lock(tmp_path, [1]):
        (tmp_path / LOCK).write_text("{")
        with pytest.raises(LockError, match="in use by another process"), run_lock(tmp_path, [2]):
            pass


def test_a_folder_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(OSError, match="run"), run_lock(tmp_path / "run", [1]):
        pass
