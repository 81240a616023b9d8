"""SLURM's names for a rank's place, and the batch script of a run."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from models.registry import ConfigError
from models.stages.cluster import Here, Slurm, adopt_step, first_host

STEP = {
    "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1(x2)",
    "SLURM_NODEID": "2", "SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "10007",
    "SLURM_STEP_NODELIST": "gpu[03-05,09]",
}  # fmt: skip


def test_a_task_of_srun_has_its_place() -> None:
    environment = dict(STEP)
    adopt_step(environment)
    found = {key: environment[key] for key in environment if key not in STEP}
    assert found == {
        "RANK": "4", "LOCAL_RANK": "0", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "gpu03", "MASTER_PORT": "20007",
    }  # fmt: skip


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {key: value for key, value in STEP.items() if key != "SLURM_STEP_ID"},  # a shell of the batch job
        STEP | {"RANK": "1"},  # torchrun under srun
        STEP | {"SLURM_STEP_NUM_TASKS": "1"},
    ],
)
def test_others_are_left_as_they_are(environment: dict[str, str]) -> None:
    before = dict(environment)
    adopt_step(environment)
    assert environment == before


@pytest.mark.parametrize("lacking", ["SLURM_PROCID", "SLURM_NODEID", "SLURM_STEP_NODELIST"])
def test_a_step_that_does_not_place_its_tasks_is_refused(lacking: str) -> None:
    with pytest.raises(ConfigError, match="does not place them"):
        adopt_step({key: value for key, value in STEP.items() if key != lacking})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("n[07-09]", "n07"), ("n[3,5]-ib,m", "n3-ib"), ("x1,n[1-2]", "x1")],
)
def test_the_first_machine_of_a_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_a_script_asks_for_what_was_wanted(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("sys.argv", ["train.py"])
    slurm = Slurm(nodes=2, partition="gpu", options=("--mem=0",), signal_seconds=90, setup="module load x")
    words = ["launcher=slurm", "launcher.nodes=2", "name=a b", "resume=false", "seed=3"]
    text = slurm.script(words, tmp_path / "train.sbatch")
    for line in (
        "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--partition=gpu", "--mem=0", "--requeue",
        "--signal=TERM@90",
    ):  # fmt: skip
        assert f"#SBATCH {line}\n" in text
    srun = next(line for line in text.splitlines() if line.startswith("srun"))
    assert srun.endswith("train.py 'name=a b' seed=3 resume=true")
    assert "account" not in text
    assert text.index("module load x") < text.index("srun")
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    assert slurm.ranks == 16


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"nodes": 0}, "at least 1"),
        ({"gpus_per_node": 0}, "give one of them"),
        ({"time": "soon"}, "time is 'soon'"),
        ({"signal_seconds": -1}, "no number negative"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Slurm(**options)


def test_handing_over(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    for name in ("SLURM_STEP_ID", "RANK"):
        monkeypatch.delenv(name, raising=False)
    run = tmp_path / "runs" / "x"
    assert not Here().takes([], run)
    assert Slurm(submit=False).takes(["seed=1"], run)
    assert (run / "train.sbatch").exists()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match="sbatch is not here"):
        Slurm().takes([], run)
    fake = tmp_path / "sbatch"
    fake.write_text("#!/bin/sh\necho 4711\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.defpath}")
    assert Slurm().takes([], run)
    assert "as job 4711" in capsys.readouterr().out
    fake.write_text("#!/bin/sh\necho no such partition >&2; exit 1\n")
    with pytest.raises(OSError, match=r"refused .*: no such partition"):
        Slurm().takes([], run)
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert not Slurm().takes([], run), "a rank submits nothing"
