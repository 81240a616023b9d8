"""A command that is run as a process group of its own leaves nothing behind."""

import sys
from pathlib import Path

from models.stages.launch import run_command
from tests.servers import wait_for

#: Starts a process that would outlive it, says which, and ends as it is told.
LEAVING = """
import os, pathlib, subprocess, sys
left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path(sys.argv[1]).write_text(str(left.pid))
os.kill(os.getpid(), 9) if sys.argv[2] == "killed" else sys.exit(int(sys.argv[2]))
"""


def test_what_a_command_started_ends_with_it(tmp_path: Path) -> None:
    for how, code in (("3", 3), ("killed", 5)):
        assert run_command([sys.executable, "-c", LEAVING, str(tmp_path / "left"), how]) == code
        left = int((tmp_path / "left").read_text())
        wait_for(lambda number=left: not is_alive(number))


def is_alive(number: int) -> bool:
    """Whether a process runs; one that nobody has heard the end of does not."""
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"
