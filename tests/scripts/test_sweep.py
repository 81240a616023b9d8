"""A sweep survives kills without losing or repeating a trial, prunes, and refuses what it cannot do."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from hydra import compose, initialize_config_dir
from optuna.trial import TrialState

from conf.cli import FOLDER
from conf.schema import plain, register
from models.registry import ConfigError
from scripts.sweeps import driver, runners
from scripts.sweeps.driver import Asked, Sweep, best_of, locked, open_study
from scripts.sweeps.figures import Figure
from scripts.sweeps.page import StudyPage, importances
from scripts.sweeps.runners import Here, Slurm, SlurmJob
from scripts.sweeps.space import Space, words_of
from tests.servers import wait_for

PROJECT = Path(__file__).resolve().parents[2]
LOSS = Figure("diffusion.val_loss", maximize=False)
SPACE = {"lr": {"low": 1e-4, "high": 1e-2, "log": True}, "width": {"choices": [8, 16]}}
#: Stands for train.py: its loss depends on its values; it goes on where it stopped, and ends with its parent.
TRAINER = """
import json, os, signal, sys, time
values = dict(word.split("=", 1) for word in sys.argv[1:])
run = os.path.join(values["folder"], values["name"])
os.makedirs(run + "/diffusion", exist_ok=True)
path = run + "/diffusion/metrics.jsonl"
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
parent = int(os.environ["FIRSTLIGHT_PARENT"])
with open(run + "/starts", "a") as file:
    file.write(" ".join(sys.argv[1:]) + chr(10))
if float(values["lr"]) < float(values.get("fails_below", 0)):
    print("train.py: it cannot be")
    sys.exit(int(values.get("code", 5)))
seen = sum(1 for _ in open(path)) if os.path.exists(path) else 0
for step in range(seen, 4):
    time.sleep(float(values.get("pause", 0)))
    if os.getppid() != parent:
        sys.exit(5)
    loss = abs(float(values["lr"]) - 3e-3) * int(values["width"]) / (step + 1)
    with open(path, "a") as file:
        file.write(json.dumps({"images": 100 * (step + 1), "val_loss": loss, "val_other": -loss}) + chr(10))
print("1 ranks with one configuration, SHA-256 abc")
"""


@pytest.fixture(autouse=True)
def trainer(tmp_path: Path, monkeypatch: Any) -> Path:
    project = tmp_path / "project"
    project.mkdir()
    (project / "train.py").write_text(TRAINER)
    monkeypatch.setattr(driver, "PROJECT", project)
    return project


def asked(trials: int = 5, space: Any = None, figures: Sequence[Figure] = (LOSS,), **options: Any) -> Asked:
    return Asked(Space(space or SPACE), figures, options.pop("base", []), trials, **options)


def run(folder: Path, what: Asked, parallel: int = 1) -> optuna.Study:
    folder.mkdir(parents=True, exist_ok=True)
    page = StudyPage(folder, [figure.name for figure in what.figures], what.base, [])
    sweep = Sweep(folder, what, Here(parallel, 1), [], page, pause=0.02)
    sweep.run()
    return sweep.study


def states(study: optuna.Study) -> list[TrialState]:
    return [t.state for t in study.get_trials() if "repeats" not in t.user_attrs]


def test_trials_run_and_the_best_is_the_best(tmp_path: Path) -> None:
    study = run(tmp_path / "s", asked(6), parallel=2)
    assert states(study) == [TrialState.COMPLETE] * 6
    losses = [trial.values[0] for trial in study.get_trials()]
    assert study.best_value == min(losses)
    document = json.loads((tmp_path / "s" / "study.json").read_text())
    assert [row["number"] for row in document["trials"]] == list(range(6))
    assert document["best"] == [losses.index(min(losses))]
    assert document["trials"][0]["config_sha256"] == "abc"
    page = (tmp_path / "s" / "study.html").read_text()
    assert "Trials as lines" in page
    assert "http" not in page.replace("http-equiv", ""), "an outside resource"


def test_values_reach_the_trainer_to_the_bit(tmp_path: Path) -> None:
    study = run(tmp_path / "s", asked(2))
    for trial in study.get_trials():
        words = (tmp_path / "s" / f"{trial.number:03d}" / "starts").read_text().split()
        assert f"lr={trial.params['lr']!r}" in words
        assert float(f"{trial.params['lr']!r}") == trial.params["lr"]


def test_two_sweeps_of_a_seed_propose_the_same(tmp_path: Path) -> None:
    one, other = (run(tmp_path / name, asked(5, seed=3)) for name in ("a", "b"))
    assert [t.params for t in one.get_trials()] == [t.params for t in other.get_trials()]
    third = run(tmp_path / "c", asked(5, seed=4))
    assert [t.params for t in third.get_trials()] != [t.params for t in one.get_trials()]


def test_a_grid_is_every_combination_once(tmp_path: Path) -> None:
    space = {"lr": {"low": 0.001, "high": 0.003, "step": 0.001}, "width": {"choices": [8, 16]}}
    study = run(tmp_path / "s", asked(99, space, grid=True))
    tried = {(round(t.params["lr"], 9), t.params["width"]) for t in study.get_trials()}
    assert tried == {(lr, width) for lr in (0.001, 0.002, 0.003) for width in (8, 16)}
    assert len(study.get_trials()) == 6


def test_an_exhausted_space_ends_the_sweep(tmp_path: Path, capsys: Any) -> None:
    study = run(tmp_path / "s", asked(9, {"lr": {"choices": [0.001, 0.002]}, "width": {"choices": [8]}}))
    assert states(study) == [TrialState.COMPLETE] * 2
    assert "exhausted" in capsys.readouterr().out


def test_a_trial_that_is_behind_is_stopped(tmp_path: Path) -> None:
    space = {"lr": {"choices": [0.003, 0.0031, 0.0032, 0.009]}, "width": {"choices": [8]}}
    what = asked(4, space, base=["pause=0.4"], prune_after=100, keep=2, grid=True)
    study = run(tmp_path / "s", what)
    pruned = [t for t in study.get_trials() if t.state is TrialState.PRUNED]
    assert pruned
    assert max(t.params["lr"] for t in study.get_trials() if t.state is TrialState.COMPLETE) < 0.009
    for trial in pruned:
        lines = (tmp_path / "s" / f"{trial.number:03d}" / "diffusion" / "metrics.jsonl").read_text()
        assert lines.count("\n") < 4, "it was let go on"


def test_values_that_diverge_are_a_result_and_failures_have_an_end(tmp_path: Path) -> None:
    study = run(tmp_path / "a", asked(3, base=["fails_below=1", "code=6"]))
    assert states(study) == [TrialState.PRUNED] * 3
    with pytest.raises(
        ConfigError, match=r"3 trials failed, the last one with exit code 5 \(train.py: it can"
    ):
        run(tmp_path / "b", asked(3, base=["fails_below=1"], failures=2))


def test_a_metric_that_never_appears_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trial 0 has ended and .* tells no diffusion\.val_los;"):
        run(tmp_path / "s", asked(figures=[Figure("diffusion.val_los", maximize=False)]))


def test_several_metrics_are_a_front(tmp_path: Path) -> None:
    both = [LOSS, Figure("diffusion.val_other", maximize=False)]
    study = run(tmp_path / "s", asked(4, figures=both))
    assert len(best_of(study)) == 4, "each is the other's opposite, so nothing dominates"
    with pytest.raises(ConfigError, match="one metric that training tells"):
        asked(4, figures=both, prune_after=100)


def test_another_sweep_in_the_folder_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "s", asked(1))
    with pytest.raises(ConfigError, match=r"holds another sweep \(seed was 0, now 1\)"):
        run(tmp_path / "s", asked(1, seed=1))
    with pytest.raises(ConfigError, match="space was"):
        run(tmp_path / "s", asked(1, {"lr": {"low": 0.1, "high": 0.2}}))
    study = run(tmp_path / "s", asked(3))  # more trials are the same sweep, longer
    assert len(study.get_trials()) == 3


def test_one_sweep_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path / "s"), pytest.raises(OSError, match=r"another sweep\.py"), locked(tmp_path / "s"):
        pass


SCRIPT = """
import sys
sys.path.insert(0, {project!r})
from pathlib import Path
from scripts.sweeps import driver
from scripts.sweeps.figures import Figure
from scripts.sweeps.page import StudyPage
from scripts.sweeps.runners import Here
from scripts.sweeps.space import Space
driver.PROJECT = Path({fake!r})
folder = Path({folder!r})
asked = driver.Asked(Space({space!r}), [Figure("diffusion.val_loss", False)], ["pause=0.1"], 6)
with driver.locked(folder):
    page = StudyPage(folder, ["diffusion.val_loss"], asked.base, [])
    driver.Sweep(folder, asked, Here(2, 1), [], page, pause=0.02).run()
"""


def test_a_trial_that_was_running_is_taken_up(tmp_path: Path) -> None:
    folder, what = tmp_path / "s", asked(3, base=["pause=0.1"])
    folder.mkdir()
    page = StudyPage(folder, [LOSS.name], what.base, [])
    killed = Sweep(folder, what, Here(2, 1), [], page)
    assert killed._fill()
    while len(list(folder.glob("*/starts"))) < 2:
        time.sleep(0.02)
    running = {number: trial.params for number, (trial, _) in killed.jobs.items()}
    for _, job in killed.jobs.values():
        os.killpg(job.process.pid, signal.SIGKILL)  # type: ignore[attr-defined]
        job.process.wait()  # type: ignore[attr-defined]
    study = run(folder, what)
    assert states(study) == [TrialState.COMPLETE] * 3
    assert {t.number: t.params for t in study.get_trials()[:2]} == running


@pytest.mark.slow
def test_killed_twice_nothing_is_lost_or_repeated(tmp_path: Path, trainer: Path) -> None:
    folder = tmp_path / "s"
    code = SCRIPT.format(project=str(PROJECT), fake=str(trainer), folder=str(folder), space=SPACE)
    for trials_begun in (1, 4):
        process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
        deadline = time.monotonic() + 120
        while len(list(folder.glob("*/starts"))) < trials_begun and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.15)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        with (folder / "journal.log").open("ab") as file:
            file.write(b'{"half a li')  # what a kill in a write leaves
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)
    study = open_study(folder, asked(6, base=["pause=0.1"]))
    assert states(study) == [TrialState.COMPLETE] * 6
    assert len({json.dumps(t.params, sort_keys=True) for t in study.get_trials()}) == 6
    again = 0
    for trial in study.get_trials():
        run_folder = folder / f"{trial.number:03d}"
        starts = (run_folder / "starts").read_text().splitlines()
        assert len(set(starts)) == 1, "a trial was taken up with other values"
        again += len(starts) - 1
        assert len((run_folder / "diffusion" / "metrics.jsonl").read_text().splitlines()) == 4
    assert again >= 1, "no trial was running when the sweep was killed"


@pytest.mark.parametrize(
    ("described", "said"),
    [
        ({}, "space is empty"),
        ({"a": 3}, "give {low"),
        ({"a": {"low": 1}}, "has no 'high'"),
        ({"a": {"low": 2, "high": 1}}, "space.a"),
        ({"a": {"low": 1, "hihg": 2}}, "did you mean 'high'"),
        ({"a": {"low": 0.0, "high": 1.0, "log": True}}, "space.a"),
    ],
)
def test_a_space_that_cannot_be_is_refused(described: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Space(described)


def test_a_grid_needs_steps() -> None:
    with pytest.raises(ConfigError, match="has no step"):
        Space({"a": {"low": 0.0, "high": 1.0}}).grid()


def test_words() -> None:
    params = {"a.b": 0.1 + 0.2, "c": True, "d": 3, "e": "x", "f": None}
    assert words_of(params) == ["a.b=0.30000000000000004", "c=true", "d=3", "e=x", "f=null"]


@pytest.mark.parametrize("name", ["val_loss", "difusion.val_loss"])
def test_a_figure_that_no_run_has_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="metric is"):
        Figure(name, maximize=False)


def test_figures_are_read_from_where_runs_write_them(tmp_path: Path) -> None:
    (tmp_path / "diffusion").mkdir()
    lines = '{"images": 8, "val_loss": 2.0}\n{"images": 9, "x": 1}\n{"images": 16, "val_loss": 1.0}\n{"ima'
    (tmp_path / "diffusion" / "metrics.jsonl").write_text(lines)
    (tmp_path / "report.json").write_text('{"adherence": {"all": 0.5}, "psnr_db": null}')
    assert LOSS.points(tmp_path) == [(8, 2.0), (16, 1.0)]
    assert LOSS.value(tmp_path) == 1.0
    assert Figure("report.adherence.all", maximize=True).value(tmp_path) == 0.5
    assert Figure("report.psnr_db", maximize=True).value(tmp_path) is None
    assert Figure("card.fd", maximize=False).value(tmp_path) is None


def test_what_mattered_is_found(tmp_path: Path) -> None:
    space = {"lr": {"low": 1e-4, "high": 1e-2, "log": True}, "width": {"choices": [8, 9]}}
    shares = importances(run(tmp_path / "s", asked(12, space)), ["loss"])["loss"]
    assert shares["lr"] > shares["width"]


def test_the_best_as_a_file_composes_what_the_command_does(tmp_path: Path) -> None:
    base = ["backbone=small", "stages=[diffusion]", "plan.diffusion.images=6_000"]
    space = {"optimizer.diffusion.lr": {"choices": [0.002]}, "backbone.head_dim": {"choices": [16]}}
    study = open_study(tmp_path, asked(1, space, base=base))
    trial = study.ask()
    params = Space(space).suggest(trial)
    study.tell(trial, 0.25)
    (tmp_path / "experiment").mkdir()
    text = StudyPage(tmp_path, ["loss"], base, []).best_yaml(study.get_trials()[0])
    (tmp_path / "experiment" / "best.yaml").write_text(text)
    register()
    with initialize_config_dir(str(FOLDER), version_base="1.3"):
        there = [f"hydra.searchpath=[file://{tmp_path}]", "experiment=best"]
        by_file, by_words = compose("train", there), compose("train", [*base, *words_of(params)])
    assert plain(by_file) == plain(by_words)


def test_the_best_as_a_file_is_an_experiment(tmp_path: Path) -> None:
    base = ["experiment=landscapes", "backbone=small"]
    study = open_study(tmp_path, asked(1, {"optimizer.diffusion.lr": {"choices": [0.002]}}, base=base))
    trial = study.ask()
    Space({"optimizer.diffusion.lr": {"choices": [0.002]}}).suggest(trial)
    study.tell(trial, 0.25)
    text = StudyPage(tmp_path, ["loss"], base, ["trainer.threads=1"]).best_yaml(study.get_trials()[0])
    assert text.startswith("# @package _global_\n")
    assert "defaults:\n- landscapes\n- override /backbone: small\n" in text
    assert "lr: 0.002" in text
    assert "python train.py experiment=landscapes backbone=small optimizer.diffusion.lr=0.002" in text


FAKES = {
    "sbatch": 'n=$(ls "$STATE" | grep -c job); (bash "$2"; echo $? > "$STATE/done.$n") >/dev/null 2>&1 & '
    'grep -o "job-name=.*" "$2" > "$STATE/job.$n"; echo $n',
    "squeue": "for word; do case $word in --name=*) "
    'for n in $(grep -lx "job-name=${word#--name=}" "$STATE"/job.* 2>/dev/null); do n=${n##*.}; '
    '[ -e "$STATE/done.$n" ] || echo $n; done; exit 0;; esac; done; [ -e "$STATE/done.$3" ] || echo RUNNING',
    "sacct": '[ -e "$STATE/done.$5" ] && code=$(cat "$STATE/done.$5") && '
    '{ [ "$code" = 0 ] && echo "COMPLETED|0:0" || echo "FAILED|$code:0"; }',
    "scancel": "true",
}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: Any) -> Callable[..., None]:
    """A SLURM that runs jobs here; called, it replaces commands."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "state").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("STATE", str(tmp_path / "state"))

    def install(**commands: str) -> None:
        for name, body in commands.items():
            path = tmp_path / "bin" / name
            path.write_text(f"#!/bin/bash\n{body}\n")
            path.chmod(0o755)

    install(**FAKES)
    return install


def test_a_job_that_was_submitted_and_not_written_down_is_found(
    tmp_path: Path, cluster: Callable[..., None]
) -> None:
    (tmp_path / "s").mkdir()
    stop = tmp_path / "stop"
    command = ["bash", "-c", f"until [ -e {stop} ]; do sleep 0.05; done"]
    try:
        started = Slurm(1, tmp_path / "s", []).start(0, command, tmp_path / "log")
        (tmp_path / "s" / "000.job").unlink()  # killed before it was written
        again = Slurm(1, tmp_path / "s", [])
        assert again.find(0) == started
        assert again.find(1) is None
        assert Slurm(1, tmp_path / "other" / "s", []).find(0) is None
        (tmp_path / "s" / "000.job").write_text("77")  # that of an earlier job
        assert again.find(0) == started
    finally:
        stop.touch()
    wait_for(lambda: started.ended() is not None)
    assert started.ended() == 0


def test_a_slurm_that_does_not_answer_ends_no_trial(
    cluster: Callable[..., None], tmp_path: Path, monkeypatch: Any
) -> None:
    cluster(squeue="exit 1", sacct='echo "RUNNING|0:0"')
    assert SlurmJob("5").ended() is None
    cluster(sacct='echo "FAILED|3:0"')
    assert SlurmJob("5").ended() == 3
    monkeypatch.setattr(runners, "_PATIENCE", 0.2)
    cluster(squeue="exec sleep 5", sacct="exec sleep 5", sbatch="exec sleep 5")
    assert SlurmJob("5").ended() is None
    with pytest.raises(OSError, match="did not answer"):
        Slurm(1, tmp_path, []).find(0)


def test_slurm_runs_trials_as_jobs(tmp_path: Path, cluster: Callable[..., None]) -> None:
    text = TRAINER.replace('parent = int(os.environ["FIRSTLIGHT_PARENT"])', "parent = os.getppid()")
    (driver.PROJECT / "train.py").write_text(text)
    folder = tmp_path / "s"
    folder.mkdir()
    what = asked(2)
    page = StudyPage(folder, [LOSS.name], [], [])
    sweep = Sweep(folder, what, Slurm(2, folder, ["--gres=gpu:8"]), [], page, pause=0.05)
    sweep.run()
    assert states(sweep.study) == [TrialState.COMPLETE] * 2
    script = (folder / "000.sbatch").read_text()
    assert "#SBATCH --gres=gpu:8\n" in script
    assert "#SBATCH --requeue\n" in script
    assert Slurm(1, folder, []).find(0) is not None, "a later sweep finds the job"
    assert Slurm(1, folder, []).find(7) is None


def test_slurm_that_is_not_here_is_said(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match="sbatch is not here"):
        Slurm(1, tmp_path, []).start(0, ["true"], tmp_path / "log")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sweep=rtaes"], "there is no sweep=rtaes (did you mean 'rates'?)"),
        ([], "space is empty"),
        (["sweep=rates", "search=tpee"], "search is 'tpee', but must be tpe or grid"),
        (["sweep=rates", "where=slrum"], "where is 'slrum', but must be here or slurm"),
        (["sweep=rates", "parallel=0"], "parallel is 0, but must be at least 1"),
        (["sweep=rates", "trails=3"], "did you mean 'trials'"),
        (["sweep=rates", "metrics={diffusion.val_loss: up}"], "must be minimize or maximize"),
    ],
)
def test_bad_words_are_one_line(
    words: list[str], said: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    from conf.cli import main
    from scripts.sweep import sweep

    monkeypatch.setattr(sys, "argv", ["sweep.py", *words, f"folder={tmp_path}"])
    with pytest.raises(SystemExit) as stopped:
        main("sweep", sweep)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
