"""SLURM: a run as a batch job that saves before its time is up and is queued again, and its ranks by srun.

`train.py launcher=slurm` writes `train.sbatch` into the run's folder and submits it; the script starts the
same command under srun with `resume=true`. A warning signal before the end of the allotted time is the
SIGTERM of the stop protocol: every rank saves and exits with 143, and the script asks for another turn. What
SLURM requeues by itself (a lost node, preemption) goes on from the last checkpoint.
"""

import os
import re
import shlex
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path

from models.registry import ConfigError

#: Ports for jobs to meet at: one for each of so many jobs in a row.
_FIRST_PORT, _PORTS = 20_000, 10_000

_SCRIPT = """#!/bin/bash
{directives}
# Written by train.py launcher=slurm; submit it again with: sbatch {script}
cd {folder}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$(({port} + SLURM_JOB_ID % {ports}))
{setup}
# The shell itself ignores the warning that the tasks get, so that it is here when they have saved.
trap '' TERM
srun --kill-on-bad-exit=1 {command}
code=$?
if [ "$code" = 143 ]; then  # stopped and saved, short of the end
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


class Launcher(ABC):
    """Interface: settings that say where a command is run."""

    @abstractmethod
    def takes(self, words: Sequence[str], folder: Path) -> bool:
        """Hands the command with the overrides `words` over, for the run in `folder`; False to run it here.

        Raises:
            OSError: it could not be handed over.
        """


class Here(Launcher):
    """This machine."""

    def takes(self, words: Sequence[str], folder: Path) -> bool:
        return False


class Slurm(Launcher):
    """A batch job of SLURM.

    Args:
        nodes: machines.
        tasks_per_node: ranks on each; 0 is one for each GPU.
        gpus_per_node: of each machine; 0 for machines without.
        cpus_per_task: cores of a rank, for its loader workers too.
        time: at most, as SLURM writes it: hours:minutes:seconds.
        signal_seconds: before the time is up, to save in.
        partition: of the cluster; its default where None.
        account: that pays.
        options: further ones of sbatch, such as `--mem=0`.
        setup: a line of shell before the ranks are started, such as `module load cuda`.
        submit: false writes the script and leaves submitting to you.
    """

    def __init__(
        self,
        nodes: int = 1,
        tasks_per_node: int = 0,
        gpus_per_node: int = 8,
        cpus_per_task: int = 8,
        time: str = "24:00:00",
        signal_seconds: int = 300,
        partition: str | None = None,
        account: str | None = None,
        options: tuple[str, ...] = (),
        setup: str = "",
        submit: bool = True,
    ) -> None:
        if min(nodes, cpus_per_task) < 1 or min(tasks_per_node, gpus_per_node, signal_seconds) < 0:
            raise ValueError("nodes and cpus_per_task must be at least 1, and no number negative")
        if not (tasks_per_node or gpus_per_node):
            raise ValueError("tasks_per_node is 0 and gpus_per_node is 0; give one of them")
        if not re.fullmatch(r"(\d+-)?\d+(:\d\d){0,2}", time):
            raise ValueError(
                f"time is {time!r}, but must be as SLURM writes it, such as 24:00:00 or 2-00:00:00"
            )
        self.nodes = nodes
        self.tasks_per_node = tasks_per_node or gpus_per_node
        self.gpus_per_node = gpus_per_node
        self.cpus_per_task = cpus_per_task
        self.time = time
        self.signal_seconds = signal_seconds
        self.partition = partition
        self.account = account
        self.options = tuple(options)
        self.setup = setup
        self.submit = submit

    @property
    def ranks(self) -> int:
        """Processes that will train together."""
        return self.nodes * self.tasks_per_node

    def takes(self, words: Sequence[str], folder: Path) -> bool:
        if "SLURM_STEP_ID" in os.environ or "RANK" in os.environ:
            return False  # this is a rank of the job
        folder.mkdir(parents=True, exist_ok=True)
        script = folder / "train.sbatch"
        script.write_text(self.script(words, script), encoding="utf-8")
        if not self.submit:
            print(f"Batch script: {script}; submit it with: sbatch {script}")
            return True
        try:
            done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True)
        except FileNotFoundError:
            raise OSError(
                f"sbatch is not here; take {script} to a machine that has SLURM, or use launcher=here"
            ) from None
        if done.returncode:
            raise OSError(f"sbatch refused {script}: {done.stderr.strip()[:300]}")
        print(f"Submitted {script} as job {done.stdout.strip()}; it logs to {folder / 'slurm-<job>.log'}")
        return True

    def script(self, words: Sequence[str], script: Path) -> str:
        """The text of the batch script, for the overrides `words` of train.py."""
        folder = script.parent.absolute()
        directives = {
            "job-name": f"firstlight-{folder.name}",
            "nodes": self.nodes,
            "ntasks-per-node": self.tasks_per_node,
            **({"gpus-per-node": self.gpus_per_node} if self.gpus_per_node else {}),
            "cpus-per-task": self.cpus_per_task,
            "time": self.time,
            **({"partition": self.partition} if self.partition else {}),
            **({"account": self.account} if self.account else {}),
            "signal": f"TERM@{self.signal_seconds}",
            "output": folder / "slurm-%j.log",
            "open-mode": "append",
        }
        lines = [f"#SBATCH --{key}={value}" for key, value in directives.items()]
        lines += ["#SBATCH --requeue", *(f"#SBATCH {option}" for option in self.options)]
        kept = [word for word in words if not word.startswith(("launcher", "resume=", "trainer.devices="))]
        entry = str(Path(sys.argv[0]).absolute())
        return _SCRIPT.format(
            directives="\n".join(lines),
            script=shlex.quote(str(script)),
            folder=shlex.quote(str(Path.cwd())),
            port=_FIRST_PORT,
            ports=_PORTS,
            setup=self.setup,
            command=shlex.join([sys.executable, entry, *kept, "resume=true"]),
        )


def adopt_step(environment: MutableMapping[str, str]) -> None:
    """Gives a task of srun the names that torchrun would have given it; others are left as they are.

    A shell inside a batch job has some of SLURM's names too, but is no step.

    Raises:
        ConfigError: a step of several tasks that says nothing of its place.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1"))
    if "SLURM_STEP_ID" not in environment or "RANK" in environment or tasks == "1":
        return
    try:
        node = int(environment["SLURM_NODEID"])
        counts = _tasks_per_node(
            environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE", tasks))
        )
        found = {
            "RANK": environment["SLURM_PROCID"],
            "LOCAL_RANK": environment["SLURM_LOCALID"],
            "WORLD_SIZE": tasks,
            "LOCAL_WORLD_SIZE": str(counts[node]),
            "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(_nodes(environment)),
            "MASTER_PORT": environment.get("MASTER_PORT")
            or str(_FIRST_PORT + int(environment.get("SLURM_JOB_ID", "0")) % _PORTS),
        }
    except (KeyError, IndexError, ValueError) as error:
        raise ConfigError(
            f"srun started {tasks} tasks, but SLURM's environment does not place them ({error!r}); start the "
            "ranks with torchrun, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
        ) from None
    environment.update(found)


def first_host(nodes: str) -> str:
    """The first machine of a list as SLURM writes it: `node[03-07,12],other` is `node03`."""
    match = re.match(r"([^,\[]+)(?:\[([^\]]*)\](\S*))?", nodes)
    if match is None:
        raise ValueError(f"no machine in {nodes!r}")
    prefix, numbers, rest = match.groups()
    if numbers is None:
        return prefix
    return f"{prefix}{re.split('[-,]', numbers)[0]}{rest.partition(',')[0]}"


def _nodes(environment: Mapping[str, str]) -> str:
    return environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]


def _tasks_per_node(text: str) -> list[int]:
    """`2(x3),1` is [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or "1") if times else [int(count)]
    return counts
