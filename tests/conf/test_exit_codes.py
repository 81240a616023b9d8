"""Whatever ends a command, its exit code tells the kind and one line on standard error says the rest."""

from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from conf.cli import EXIT_CODES
from data.index import DataError
from data.loader import WorkerError
from evaluation.adherence import JudgeError
from models.checkpoint import CheckpointError
from models.checkpoint_writer import SaveError
from models.registry import ConfigError
from models.stages.lock import LockError
from models.stages.ranks import RankError
from models.stages.signals import Stopped

Command = Callable[..., int]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def ending_with(error: BaseException, command: Command, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of a training that ends so."""

    def train(config: DictConfig) -> None:
        raise error

    monkeypatch.setattr("train.train", train)
    return command("train")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("seed is x; give a number"), 2),
        (DataError("s3://b/a.tar: answers 403 (1 attempt, last status 403); renew AWS_PROFILE"), 3),
        (CheckpointError("runs/a was made with other settings; use those again"), 4),
        (JudgeError("judge: damaged; train it again"), 4),
        (SaveError("images-000000000008: could not be written; make room"), 5),
        (LockError("runs/a is in use by process 7; wait for it"), 5),
        (RankError("rank 0 of 2 waited in vain: rank 1; continue with resume=true"), 5),
        (OSError(28, "No space left on device", "runs/a"), 5),
        (WorkerError("loader worker 7 was killed by SIGKILL: memory ran out; lower data.workers"), 5),
        (FloatingPointError("stage diffusion at 8 images: not finite; lower optimizer.diffusion.lr"), 6),
        (KeyboardInterrupt(), 130),
    ],
)
def test_the_code_tells_the_kind(
    error: BaseException, code: int, command: Command, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    assert ending_with(error, command, monkeypatch) == code
    said = capsys.readouterr().err
    assert said.startswith("train.py: ")
    assert said.count("\n") == 1
    assert "Traceback" not in said
    words = {
        KeyboardInterrupt: "interrupted; continue with resume=true",
        OSError: "runs/a: No space left on device; check that the path exists, is writable and has space",
    }
    assert words.get(type(error), str(error)) in said


@pytest.mark.parametrize("code", [143, 130])
def test_a_run_that_was_asked_to_stop_says_how_to_go_on(
    code: int, command: Command, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    assert ending_with(Stopped(code), command, monkeypatch) == code
    assert capsys.readouterr().err == "train.py: stopped and saved; continue with resume=true\n"


def test_what_befalls_one_rank_is_said_by_it(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert ending_with(RankError("rank 1 of 2 lost contact"), command, monkeypatch) == 5
    assert capsys.readouterr().err == "train.py: rank 1: rank 1 of 2 lost contact\n"
    assert ending_with(ConfigError("every rank meets this"), command, monkeypatch) == 2
    assert capsys.readouterr().err == ""


def test_only_an_error_that_nobody_thought_of_is_a_traceback(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyError):
        ending_with(KeyError("a fault of the program"), command, monkeypatch)
    assert {code for _, code in EXIT_CODES} == {2, 3, 4, 5, 6, 130}
