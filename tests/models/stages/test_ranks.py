"""Ranks are real processes here: they agree, they share, and a lost one is named instead of waited for."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from models.stages.ranks import Ranks

PROJECT = Path(__file__).resolve().parents[3]
#: Launches two of itself; each does what its number says.
SCRIPT = """
import os, signal, sys, time
sys.path.insert(0, {project!r})
from models.stages.launch import launch, stay_with_parent
if "RANK" not in os.environ:
    sys.exit(launch(2))
stay_with_parent()
{start}
import torch
from models.stages.ranks import Ranks, RankError
try:
    with Ranks.join(timeout={timeout}, connect_timeout=90) as ranks:
        {body}
except RankError as error:
    print(f"rank {{os.environ['RANK']}}: {{error}}", flush=True)
    os._exit(5)
"""


def script(tmp_path: Path, body: str, timeout: float = 20.0, start: str = "") -> "subprocess.Popen[str]":
    path = tmp_path / "two.py"
    indented = body.strip().replace("\n", "\n        ")
    path.write_text(SCRIPT.format(project=str(PROJECT), timeout=timeout, body=indented, start=start))
    return subprocess.Popen(
        [sys.executable, str(path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")},
    )  # fmt: skip


def test_alone_every_answer_is_immediate() -> None:
    ranks = Ranks.alone()
    assert ranks.first
    assert ranks.gather([1.0, 2.0]) == [[1.0, 2.0]]
    assert ranks.share({"a": 1}) == {"a": 1}
    assert torch.equal(ranks.gather_tensor(torch.arange(3.0)), torch.arange(3.0))
    ranks.wait()


@pytest.mark.distributed
def test_two_agree(tmp_path: Path) -> None:
    process = script(tmp_path, """
gathered = ranks.gather([ranks.rank, 0.1 + ranks.rank])
shared = ranks.share({"from": ranks.rank})
vector = ranks.gather_tensor(torch.arange(2.0 + ranks.rank))
if ranks.rank == 1:
    print(gathered, shared, vector.tolist(), flush=True)
""")  # fmt: skip
    assert (
        process.communicate(timeout=60)[0]
        == "[[0.0, 0.1], [1.0, 1.1]] {'from': 0} [0.0, 1.0, 0.0, 1.0, 2.0]\n"
    )
    assert process.returncode == 0


@pytest.mark.distributed
def test_a_killed_rank_is_named_and_takes_the_others_with_it(tmp_path: Path) -> None:
    began = time.monotonic()
    process = script(tmp_path, """
ranks.wait()
if ranks.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
ranks.wait()
""")  # fmt: skip
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 5
    assert "rank 1 (process " in text
    assert "was killed by SIGKILL, from outside or for want of memory" in text
    assert "continue with resume=true" in text
    assert "rank 0: rank 0 of 2 lost contact with the others" in text
    assert time.monotonic() - began < 40


@pytest.mark.distributed
def test_a_rank_that_stands_still_is_named(tmp_path: Path) -> None:
    """Both come to step 3; then rank 1 is stopped, and rank 0 says so after its timeout."""
    process = script(tmp_path, """
for step in range(4 if ranks.rank == 0 else 3):
    ranks.beat(step)
    ranks.wait()
    if ranks.rank == 1 and step == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
ranks.wait()
""", timeout=3.0)  # fmt: skip
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 5
    assert "rank 0 of 2 waited in vain: rank 1 was last heard of at step 2" in text
    assert "raise trainer.timeout" in text


@pytest.mark.distributed
def test_the_exit_code_is_that_of_the_rank_that_failed(tmp_path: Path) -> None:
    process = script(tmp_path, """
ranks.wait()
if ranks.rank == 1:
    os._exit(3)
time.sleep(0.2)
""")  # fmt: skip
    process.communicate(timeout=60)
    assert process.returncode == 3


@pytest.mark.distributed
def test_a_rank_that_dies_at_the_start_is_named(tmp_path: Path) -> None:
    """The other one waits for it, and would for `connect_timeout`."""
    process = script(tmp_path, "ranks.wait()", start="if os.environ['RANK'] == '1': os._exit(3)")
    text = process.communicate(timeout=80)[0]
    assert process.returncode == 3
    assert re.fullmatch(
        r"train.py: rank 1 \(process \d+\) ended with code 3 while 1 waited for it; all end; what it said "
        r"is above\n",
        text,
    )


@pytest.mark.distributed
def test_a_signal_to_the_parent_reaches_every_rank(tmp_path: Path) -> None:
    process = script(tmp_path, """
seen = []
signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
ranks.wait()
os.write(1, b"ready\\n")
while not seen:
    time.sleep(0.02)
ranks.wait()
os._exit(143)
""")  # fmt: skip
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "ready\n"]
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    process.stdout.close()


@pytest.mark.distributed
def test_orphans_end_by_themselves(tmp_path: Path) -> None:
    process = script(tmp_path, """
ranks.wait()
os.write(1, b"%d\\n" % os.getpid())  # at once: two processes share the pipe
time.sleep(60)
""")  # fmt: skip
    assert process.stdout is not None
    pids = [int(process.stdout.readline()) for _ in range(2)]
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.stdout.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
