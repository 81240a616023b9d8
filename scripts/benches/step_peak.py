"""The most memory that training steps of one network take, in a process that has done nothing else.

`python -m scripts.benches.step_peak '{"ours": true, ...}'` prints two numbers as JSON, MB at the peak and MB
before there was a network, of what its step takes to import; `peak` starts it. On a GPU it is what torch
allocated there.
"""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import torch

from models.stages.compute import Compute
from scripts.benches.measuring import peak_rss
from scripts.benches.step_arms import Problem, Steps, Theirs

PROJECT = Path(__file__).resolve().parents[2]
STEPS = 3


class PeakError(RuntimeError):
    """The process that measures ended with an error."""


def peak(problem: Problem, compute: Compute, ours: bool, batch: int) -> tuple[float, float]:
    """MB at the peak of a few steps in a fresh process, and MB that it had before it had a network.

    Raises:
        PeakError: the process ended with an error.
    """
    told = {
        "problem": problem.document(),
        "compute": compute.document(),
        "ours": ours,
        "batch": batch,
        "threads": torch.get_num_threads(),
    }
    command = [sys.executable, "-m", "scripts.benches.step_peak", json.dumps(told)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PeakError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    found = json.loads(done.stdout.splitlines()[-1])
    return found["peak"], found["before"]


def main(told: str) -> None:
    """Makes the steps that `told` describes, and prints what they took."""
    document = json.loads(told)
    torch.set_num_threads(document["threads"])
    problem = Problem(**document["problem"])
    compute = Compute.read(document["compute"], "as told")
    if document["ours"]:
        before = _peak(compute)
        network: torch.nn.Module = problem.unet()
    else:
        with torch.device("meta"):
            unet = problem.unet()
            Theirs(unet)  # which imports diffusers
        before = _peak(compute)
        network = Theirs(unet)
    steps = Steps(network, compute, [problem.batch(document["batch"], 0)])
    for _ in range(STEPS):
        steps.step()
    print(json.dumps({"peak": _peak(compute), "before": before}))


def _peak(compute: Compute) -> float:
    if compute.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    # Not `ru_maxrss` where it can be helped: Linux hands a child the peak of the process that started it.
    told = peak_rss([os.getpid()])
    if told is not None:
        return told
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


if __name__ == "__main__":
    main(sys.argv[1])
