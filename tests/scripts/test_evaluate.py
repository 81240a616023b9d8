"""`scripts/evaluate.py` with a tiny model: one card however the work is cut up, and what it refuses."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data.landscapes import write_landscapes
from evaluation.adherence import save_judge, train_judge
from evaluation.card import CARD, FEATURES, read_card

PROJECT = Path(__file__).resolve().parents[2]
Command = Callable[..., int]
WORDS = (
    *("checkpoint=runs/tiny", "shards=shards", "device=cpu", "num_steps=1", "pictures=24"),
    *("variety.prompts=3", "variety.seeds=8", "variety.class_field=time"),
)


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, make_run: Callable[..., Path], tiny_config: dict[str, Any]
) -> Path:
    """A folder with the run of a tiny model that was never trained, landscapes, and a hasty judge."""
    folder = tmp_path_factory.mktemp("world")
    make_run(folder / "runs" / "tiny", tiny_config)
    for name, count, seed in (("train", 192, 1), ("val", 80, 2)):
        write_landscapes(folder / "shards" / name, count, 32, seed, 96, 1)
    judge, _ = train_judge(0, images=256, epochs=1)
    save_judge(judge, folder / "runs" / "judge")
    return folder


@pytest.fixture(autouse=True)
def _in_the_world(world: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(world)
    yield
    shutil.rmtree(world / "out", ignore_errors=True)
    shutil.rmtree(world / "other", ignore_errors=True)


def test_two_evaluations_give_one_card(command: Command, capsys: Any) -> None:
    assert command("evaluate", *WORDS, "out=out") == 0
    assert "tiny at 8: FD " in capsys.readouterr().out
    assert command("evaluate", *WORDS, "out=other", "batch_size=5") == 0
    for name in (CARD, FEATURES):
        assert (Path("out") / name).read_bytes() == (Path("other") / name).read_bytes()
    card = read_card(Path("out"))
    assert {"fd", "fd_floor", "kid_se", "adherence_all_real", "variety_different"} <= card.metrics.keys()
    assert "memorization_copies" in card.metrics
    assert card.made["num_steps"] == 1
    assert card.measured["pictures"] == 24
    assert str(Path.cwd()) not in (Path("out") / CARD).read_text()
    assert "Sameness" in (Path("out") / "report.html").read_text()


@pytest.mark.distributed
def test_two_processes_give_the_card_of_one(command: Command) -> None:
    assert command("evaluate", *WORDS, "out=out") == 0
    again = [sys.executable, str(PROJECT / "scripts" / "evaluate.py"), *WORDS, "out=other", "devices=2"]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    assert subprocess.run(again, env=environment, timeout=300).returncode == 0
    assert (Path("out") / CARD).read_bytes() == (Path("other") / CARD).read_bytes()


def test_ranks_as_torchrun_sets_them(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command("evaluate", *WORDS, "out=out") == 0
    wanted = (Path("out") / CARD).read_bytes()
    shutil.copytree("out", "other")
    for name in (CARD, FEATURES, "report.html"):
        (Path("other") / name).unlink()
    shutil.rmtree("other/pictures")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert command("evaluate", *WORDS, "out=other") == 0
    assert len(list(Path("other/pictures").glob("*.png"))) == 24  # half of 24 + 3 x 8
    assert not (Path("other") / CARD).exists()
    monkeypatch.setenv("RANK", "0")
    assert command("evaluate", *WORDS, "out=other") == 0
    assert (Path("other") / CARD).read_bytes() == wanted


def test_an_evaluation_goes_on_where_it_was_killed(command: Command, capsys: Any) -> None:
    assert command("evaluate", *WORDS, "out=out") == 0
    wanted, out = (Path("out") / CARD).read_bytes(), Path("out")
    for path in (out / CARD, out / FEATURES, *list((out / "pictures").glob("0001*.png"))):
        path.unlink()
    (out / "pictures" / "00020.png").unlink()
    assert command("evaluate", *WORDS, "out=out") == 0
    assert "37 of 48 pictures are there already" in capsys.readouterr().out
    assert (out / CARD).read_bytes() == wanted


def test_another_evaluation_is_not_written_over(command: Command, capsys: Any) -> None:
    assert command("evaluate", *WORDS, "out=out") == 0
    before = (Path("out") / CARD).read_bytes()
    assert command("evaluate", *WORDS, "out=out", "seed=1") == 2
    error = capsys.readouterr().err
    assert "out holds another evaluation (" in error.splitlines()[-1]
    assert (Path("out") / CARD).read_bytes() == before
    assert command("evaluate", *WORDS, "out=out", "seed=1", "overwrite=true") == 0
    assert json.loads((Path("out") / CARD).read_text())["made"]["seed"] == 1


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["checkpoint=nowhere"], 4, "nowhere: there is no such run folder"),
        (["pictures=1"], 2, "pictures is 1, but must be from 8"),
        (["variety.seeds=2"], 2, "variety.seeds is 2, but must be from 4"),
        (["variety.sedes=8"], 2, "(did you mean 'variety.seeds'?)"),
        (["features=inception"], 2, "features=inception needs its weights"),
        (["features_file=x"], 2, "features_file has no effect with features=judge"),
        (["shards=nowhere"], 3, "nowhere"),
        (["out=shards"], 2, "shards holds files that are no evaluation"),
        (["size=17"], 2, "size is 17"),
        (["device=tpu"], 2, "device is 'tpu'"),
    ],
)
def test_bad_input_is_one_line(words: list[str], code: int, said: str, command: Command, capsys: Any) -> None:
    given = {word.partition("=")[0]: word for word in (*WORDS, "out=out")}
    given |= {word.partition("=")[0]: word for word in words}
    assert command("evaluate", *given.values()) == code
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


def test_a_run_without_a_diffusion_stage(command: Command, world: Path, capsys: Any) -> None:
    shutil.copytree(world / "runs" / "tiny" / "autoencoder", world / "other" / "autoencoder")
    assert command("evaluate", "checkpoint=other", "shards=shards") == 4
    assert "has no verified diffusion checkpoint" in capsys.readouterr().err
