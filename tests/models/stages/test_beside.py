"""A command beside a training: what it is given, what it says, and that it ends with the training."""

import os
import sys
import time
from pathlib import Path

import pytest

from models.stages.beside import Beside
from models.stages.launch import PARENT

TELLING = (
    "import os; print(os.environ['OMP_NUM_THREADS'], os.environ['" + PARENT + "'], 'RANK' in os.environ);"
    "raise SystemExit(3)"
)
DEAF = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("deaf", flush=True)
signal.pause()
"""


def test_what_it_is_given_and_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with Beside([sys.executable, "-c", TELLING], threads=2, log=tmp_path / "log") as each:
        each.wait(60)
        assert each.code == 3
    assert (tmp_path / "log").read_text().split() == ["2", str(os.getpid()), "False"]


def test_it_ends_with_the_training(tmp_path: Path) -> None:
    with Beside([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log") as each:
        each.wait(0.01)
        assert each.code is None
    assert each.code is not None
    with pytest.raises(ProcessLookupError):
        os.kill(each.pid, 0)


def test_one_that_does_not_listen_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.stages.beside._GRACE", 0.2)
    with Beside([sys.executable, "-c", DEAF], log=tmp_path / "log") as each:
        while not (tmp_path / "log").read_text():
            time.sleep(0.01)
    assert each.code == -9


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nothing"):
        Beside([str(tmp_path / "nothing")], tmp_path / "log")
