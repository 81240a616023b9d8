"""A sweep whose trials are two processes each: real runs, with one configuration on both ranks of each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.faults.runs import WORDS, write_data
from scripts.faults.zygote import PROJECT

pytestmark = pytest.mark.distributed


def test_trials_of_two_ranks_tell_the_configuration_that_both_have(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    own = ("name=", "resume=")  # these the sweep gives
    words = [*(word for word in WORDS if not word.startswith(own)), "plan.diffusion.images=32"]
    shared = ",".join(f"'{word}'" for word in [*words, f"data.shards={data}"])
    command = [
        sys.executable, str(PROJECT / "scripts" / "sweep.py"), "sweep=rates", "trials=2", "devices=2",
        "prune_after_images=0", f"overrides=[{shared}]", f"folder={tmp_path}", "name=pair",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
    ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    rows = json.loads((tmp_path / "pair" / "study.json").read_text())["trials"]
    assert [row["state"] for row in rows] == ["complete", "complete"]
    assert len({row["config_sha256"] for row in rows}) == 2  # other values, another configuration
    for row in rows:
        said = (tmp_path / "pair" / f"{row['number']:03d}.log").read_text()
        assert f"2 ranks with one configuration, SHA-256 {row['config_sha256']}\n" in said
