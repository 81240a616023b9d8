"""How long it takes from the command to the first step, by the number of ranks, on this machine.

`python -m scripts.benches.startup 1 2 4` makes the small run of `scripts/faults/runs.py` with so many
processes, each number as often as `TIMES`, in turn, and prints the shortest and the longest of each as JSON.
Ranks are whole processes with imports of their own: on a machine with fewer cores than ranks, those dominate.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from scripts.faults.runs import WORDS, write_data
from scripts.faults.zygote import PROJECT

TIMES = 2
PATIENCE = 240.0


def seconds_to_first_step(ranks: int, data: Path, folder: Path) -> float:
    """Seconds from starting train.py with `ranks` processes to the end of its first step.

    Raises:
        RuntimeError: the run ended, or took too long, before its first step.
    """
    words = (*WORDS, f"data.shards={data}", f"folder={folder}", f"trainer.devices={ranks}")
    trace = folder / "run" / "autoencoder" / "trace-0.jsonl"
    began = time.monotonic()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "train.py", *words], cwd=PROJECT, stdout=log, stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    try:
        while not (trace.exists() and trace.stat().st_size):
            if process.poll() is not None or time.monotonic() - began > PATIENCE:
                raise RuntimeError(f"{ranks} ranks made no step: {(folder / 'log').read_text()[-600:]}")
            time.sleep(0.02)
        return time.monotonic() - began
    finally:
        for number in (signal.SIGTERM, signal.SIGTERM):  # the second ends at once, without saving
            process.send_signal(number)
            time.sleep(0.5)
        process.wait()


def main(words: list[str]) -> None:
    """Prints a line for each number of ranks in `words`."""
    numbers = [int(word) for word in words] or [1, 2, 4]
    found: dict[int, list[float]] = {ranks: [] for ranks in numbers}
    with tempfile.TemporaryDirectory() as place:
        data = write_data(Path(place) / "data")
        for k in range(TIMES):
            for ranks in numbers:
                folder = Path(place) / f"{k}-{ranks}"
                folder.mkdir()
                found[ranks].append(seconds_to_first_step(ranks, data, folder))
    for ranks, seconds in found.items():
        line = {"ranks": ranks, "shortest_s": round(min(seconds), 1), "longest_s": round(max(seconds), 1)}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
