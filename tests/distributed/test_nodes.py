"""Several machines on one: rendezvous groups of torchrun on loopback; SLURM's commands played by scripts."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from scripts.faults.runs import WORDS
from tests.distributed.runs import IMAGES, Runs

pytestmark = pytest.mark.distributed
PROJECT = Path(__file__).resolve().parents[2]
PATIENCE = 240


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def words(data: Path) -> list[str]:
    return [*WORDS, f"plan.diffusion.images={IMAGES}", f"data.shards={data}", "resume=true"]


def node(number: int, port: int, place: Path, data: Path) -> "subprocess.Popen[bytes]":
    """Machine `number` of two, with one rank, as an operator starts it."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1",
        f"--node-rank={number}", "--master-addr=127.0.0.1", f"--master-port={port}", "--max-restarts=0",
        str(PROJECT / "train.py"), *words(data),
    ]  # fmt: skip
    with (place / f"node-{number}.log").open("ab") as log:
        return subprocess.Popen(
            command, cwd=place, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def said(place: Path) -> str:
    """The end of what the first machine printed."""
    return (place / "node-0.log").read_text()[-2000:]


def kill_all(machine: "subprocess.Popen[bytes]") -> None:
    """Kills torchrun and its workers at once, which are of sessions of their own."""
    workers = Path(f"/proc/{machine.pid}/task/{machine.pid}/children").read_text().split()
    for pid in [*map(int, workers), machine.pid]:
        os.kill(pid, signal.SIGKILL)


def test_a_machine_dies_and_both_go_on(runs: Runs, tmp_path: Path) -> None:
    whole = runs.run("two", 2)
    machines = [node(number, port, tmp_path, runs.data) for port in [free_port()] for number in (0, 1)]
    checkpoints = tmp_path / "runs" / "run" / "diffusion" / "checkpoints"
    deadline = time.monotonic() + PATIENCE
    while not list(checkpoints.glob("images-*")) and time.monotonic() < deadline:
        assert all(machine.poll() is None for machine in machines), (tmp_path / "node-0.log").read_text()[
            -2000:
        ]
        time.sleep(0.01)
    kill_all(machines[1])
    assert machines[1].wait(30) < 0
    assert machines[0].wait(120) != 0, "it noticed nothing"
    assert "lost contact" in (tmp_path / "node-0.log").read_text()
    port = free_port()
    again = [node(number, port, tmp_path, runs.data) for number in (0, 1)]
    assert [machine.wait(PATIENCE) for machine in again] == [0, 0], (tmp_path / "node-0.log").read_text()[
        -2000:
    ]
    state = type(whole)(tmp_path / "runs" / "run", "").states()
    assert state == whole.states(), "other bits than those of two ranks on one machine"


FAKES = {
    "sbatch": 'SLURM_JOB_ID=31 SLURM_JOB_NODELIST=localhost bash "$2" > "$STATE/job.log" 2>&1; echo 31',
    "scontrol": 'if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$STATE/requeued"; fi',
    "srun": """shift
for k in 0 1; do
  SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_TASKS_PER_NODE=2 SLURM_NODEID=0 SLURM_PROCID=$k \\
    SLURM_LOCALID=$k SLURM_STEP_NODELIST=localhost "$@" & pids="$pids $!"
done
if [ -n "$WARN" ]; then
  until ls $WARN >/dev/null 2>&1; do sleep 0.05; done
  kill -TERM $pids
fi
code=0
for pid in $pids; do wait $pid || code=$?; done
exit $code""",
}


def test_a_batch_job_saves_asks_for_another_turn_and_goes_on(
    runs: Runs, tmp_path: Path, monkeypatch: Any
) -> None:
    whole = runs.run("two", 2)
    (tmp_path / "bin").mkdir()
    for name, body in FAKES.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    run = tmp_path / "runs" / "run"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")} | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "STATE": str(tmp_path), "OMP_NUM_THREADS": "1",
        "WARN": str(run / "diffusion" / "checkpoints" / "images-*"),
    }  # fmt: skip
    slurm = ["launcher=slurm", "launcher.gpus_per_node=0", "launcher.tasks_per_node=2"]
    command = [sys.executable, str(PROJECT / "train.py"), *words(runs.data), *slurm]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    log = tmp_path / "job.log"
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "requeued").read_text() == "requeue 31\n", log.read_text()[-2000:]
    environment |= {"WARN": ""}
    again = ["sbatch", "--parsable", str(run / "train.sbatch")]
    subprocess.run(again, cwd=tmp_path, env=environment, check=True, timeout=PATIENCE, capture_output=True)
    assert (tmp_path / "requeued").read_text() == "requeue 31\n", "it came to its end"
    assert type(whole)(run, "").states() == whole.states(), log.read_text()[-2000:]
