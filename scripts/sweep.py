"""Searches hyper-parameters: Optuna proposes, train.py runs each trial as a process group of its own.

    python scripts/sweep.py sweep=rates                  conf/sweep/rates.yaml
    python scripts/sweep.py sweep=rates trials=24 parallel=2 name=longer
    python scripts/sweep.py sweep=rates where=slurm 'slurm=[--gres=gpu:8,--time=4:00:00]' devices=8

A sweep that was stopped or killed goes on with the same command: what was running is taken up with its
number, its values and its checkpoints. `runs/<name>/study.html` is the page about it, written after every
trial.
"""

import os
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from conf.cli import main
from conf.schema import StageName, plain
from models.registry import ConfigError
from scripts.sweeps.driver import Asked, Sweep, locked
from scripts.sweeps.figures import Figure
from scripts.sweeps.page import StudyPage
from scripts.sweeps.runners import Here, Runner, Slurm
from scripts.sweeps.space import Space

_DIRECTIONS = {"minimize": False, "maximize": True}


def sweep(config: DictConfig) -> None:
    """Runs the sweep that the composed configuration describes."""
    values = plain(config)
    name = values["name"] or HydraConfig.get().runtime.choices.get("sweep") or "sweep"
    folder = Path(values["folder"]) / str(name)
    asked = read(values)
    for key in ("parallel", "devices"):
        if values[key] < 1:
            raise ConfigError(f"{key} is {values[key]}, but must be at least 1")
    if any((folder / name).is_dir() for name in StageName.__members__):
        raise ConfigError(f"{folder} is a run and no sweep; give the sweep another name=...")
    extra = how_to_run(values, asked)
    with locked(folder):
        page = StudyPage(folder, [figure.name for figure in asked.figures], asked.base, extra)
        Sweep(folder, asked, make_runner(values, folder), extra, page).run()
    print(f"Study: {folder / 'study.html'} (figures: {folder / 'study.json'})")
    print(f"Best: {folder / 'best.yaml'}")


def read(values: dict[str, Any]) -> Asked:
    """What is asked for; raises ConfigError for what cannot be."""
    figures = []
    for metric, direction in values["metrics"].items():
        if direction not in _DIRECTIONS:
            raise ConfigError(f"metrics.{metric} is {direction!r}, but must be minimize or maximize")
        figures.append(Figure(str(metric), _DIRECTIONS[direction]))
    if values["search"] not in ("tpe", "grid"):
        raise ConfigError(f"search is '{values['search']}', but must be tpe or grid")
    return Asked(
        Space(values["space"]),
        figures,
        [str(word) for word in values["overrides"]],
        values["trials"],
        values["search"] == "grid",
        values["seed"],
        values["prune_after_images"],
        values["keep_one_in"],
        values["failures"],
    )


def how_to_run(values: dict[str, Any], asked: Asked) -> list[str]:
    """Overrides that every trial gets beside what is varied: its devices and threads, its group of runs."""
    given = {word.partition("=")[0] for word in asked.base}
    extra = [f"trainer.devices={values['devices']}"] if values["devices"] > 1 else []
    if "trainer.threads" not in given and values["where"] == "here":
        cores = len(os.sched_getaffinity(0)) // (values["parallel"] * values["devices"])
        extra.append(f"trainer.threads={max(1, cores)}")
    if "logger=wandb" in asked.base and "logger.group" not in given:
        extra.append(f"logger.group={values['name'] or 'sweep'}")
    return extra


def make_runner(values: dict[str, Any], folder: Path) -> Runner:
    """Who runs the trials; raises ConfigError for nobody known."""
    if values["where"] == "here":
        return Here(values["parallel"], values["devices"])
    if values["where"] == "slurm":
        return Slurm(values["parallel"], folder.absolute(), [str(option) for option in values["slurm"]])
    raise ConfigError(f"where is '{values['where']}', but must be here or slurm")


if __name__ == "__main__":
    main("sweep", sweep)
