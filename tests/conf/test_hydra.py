"""A command is composed once, and as `hydra.main` composes it; options of Hydra's are left to that."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

Command = Callable[..., int]
#: One that changes nothing, and has `hydra.main` compose the command.
BY_HYDRA = "hydra.job.chdir=false"


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each job of a command was given, instead of training."""
    found: list[dict[str, Any]] = []

    def train(config: DictConfig) -> None:
        of = HydraConfig.get()
        given = {
            "config": OmegaConf.to_container(config, resolve=True),
            "mode": "" if of.mode is None else of.mode.name,
            "words": [word for word in of.overrides.task if word != BY_HYDRA],
            "choices": OmegaConf.to_container(of.runtime.choices),
            "level": logging.getLogger().level,
        }
        found.append(given)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("train.train", train)
    return found


def test_a_command_is_given_what_hydra_would_give(told: list[dict[str, Any]], command: Command) -> None:
    words = ["experiment=flowers", "data.shards=here", "plan.diffusion.images=8"]
    assert command("train", *words) == command("train", *words, BY_HYDRA) == 0
    ours, theirs = told
    assert ours["words"] == words
    assert ours["choices"]["experiment"] == "flowers"
    assert ours | {"mode": "RUN"} == theirs


def test_and_is_composed_once(
    told: list[dict[str, Any]], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise AssertionError("hydra.main composes everything twice")

    monkeypatch.setattr(hydra, "main", refuse)
    assert command("train") == 0
    assert len(told) == 1


@pytest.mark.parametrize("word", ["--multirun", "-m", "hydra.mode=MULTIRUN"])
def test_several_jobs_are_left_to_hydra(word: str, told: list[dict[str, Any]], command: Command) -> None:
    assert command("train", word, "seed=3,4") == 0
    assert [each["config"]["seed"] for each in told] == [3, 4]
    assert {each["mode"] for each in told} == {"MULTIRUN"}


def test_values_of_several_jobs_are_refused_of_one(told: list[Any], command: Command, capsys: Any) -> None:
    assert command("train", "seed=3,4") == 2
    assert "Ambiguous value for argument 'seed=3,4'" in capsys.readouterr().err
    assert not told
