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
import torch
import torch.nn.functional as F
from torch import Tensor

from data.datamodule import ShardData
from data.landscapes import write_landscapes
from evaluation import judges
from evaluation.adherence import save_judge, train_judge
from evaluation.asks import RealData, open_real
from evaluation.card import CARD, FEATURES, Card, read_card
from models.pipeline import Pipeline

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
    make_run(folder / "runs" / "larger", {**tiny_config, "resolution": 32})
    for name, count, seed in (("train", 192, 1), ("val", 80, 2)):
        write_landscapes(folder / "shards" / name, count, 32, seed, 96, 1)
    judge, _ = train_judge(0, images=1_024, epochs=2)
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
    shutil.rmtree(Path("out") / "pictures")  # as a replacement that was cut off leaves it
    (Path("out") / CARD).unlink()
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
        (["scorer=juge"], 2, "scorer is 'juge', but must be"),
        (["scorer=clip:ViT-B-32"], 2, "scorer_file is the weights of scorer=clip:MODEL"),
        (["prompts=nowhere"], 3, "nowhere: cannot be read"),
        (["features_file=x"], 2, "features_file has no effect with features=judge"),
        (["shards=nowhere"], 3, "nowhere"),
        (["out=shards"], 2, "shards holds files that are no evaluation"),
        (["out=shards", "overwrite=true"], 2, "shards holds files that are no evaluation"),
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


def test_a_suite_of_prompts_has_categories_and_no_distances(command: Command, tmp_path: Path) -> None:
    suite = tmp_path / "suite.tsv"
    suite.write_text("a clear dawn over the sea\tsea\na cloudy night over hills\thills\n" * 4)
    assert command("evaluate", *WORDS, "out=out", f"prompts={suite}") == 0
    card = read_card(Path("out"))
    assert card.measured["prompts"] == "text"
    assert card.measured["pictures"] == 8
    assert "fd" not in card.metrics
    assert card.metrics["adherence_prompts"] == 8
    assert "<td>hills</td>" in (Path("out") / "report.html").read_text()


def test_a_classifier_of_any_classes(command: Command, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(judges, "_CLASSIFIER_STEPS", 6)
    words = [*WORDS, "scorer=classifier", "memorization=false", "variety.prompts=0"]
    assert command("evaluate", *words, "out=out") == 0
    assert "class of the prompt recognised" in capsys.readouterr().out
    card = read_card(Path("out"))
    assert card.measured["scorer"] == "classifier"
    assert card.measured["scorer_classes"] == 4
    assert 0 <= card.measured["scorer_held_out"] <= 1
    assert 0.3 < card.metrics["adherence_class_real"] <= 1  # night and noon are soon told apart
    assert card.metrics["adherence_prompts"] == 24
    kept = list(Path("runs").glob("classifier-*/classifier.safetensors"))
    assert len(kept) == 1
    assert command("evaluate", *words, "out=other") == 0
    assert "training a classifier" not in capsys.readouterr().out  # the one that was kept
    assert (Path("other") / CARD).read_bytes() == (Path("out") / CARD).read_bytes()
    captions = [word for word in words if not word.startswith("variety.class_field")]
    assert command("evaluate", *captions, "out=third", "variety.class_field=nothing") == 2
    assert "give variety.class_field a field" in capsys.readouterr().err


# --- generators with a fault, evaluated as any other --------------------------------------------------------


@pytest.fixture
def painted(world: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Card]:
    """The card of a generator that paints `paint(number of the prompt, seed)`, given the real pictures."""
    real = open_real(ShardData("shards", resolution=32), 1, 64, "time")
    numbers: dict[str, int] = {}
    for k, ask in enumerate(real.held_out.asks):
        numbers.setdefault(ask.text, k)

    def card(paint: Callable[[RealData, int, int], Tensor]) -> Card:
        def generate(self: Pipeline, jobs: Any, *_: Any) -> Tensor:
            return torch.stack([paint(real, numbers[job.prompt], job.index) for job in jobs])

        monkeypatch.setattr(Pipeline, "generate", generate)
        words = [*WORDS, "checkpoint=runs/larger", "pictures=64", "out=out", "overwrite=true"]
        shutil.rmtree("out", ignore_errors=True)
        assert command("evaluate", *words) == 0
        return read_card(Path("out"))

    return card


def same_class(real: RealData, number: int, seed: int) -> Tensor:
    """A perfect generator: a held-out picture of the prompt's class, another one for each seed."""
    wanted = real.known_new.asks[number].of_class
    rows = [k for k, ask in enumerate(real.known_new.asks) if ask.of_class == wanted]
    return real.known_new.pictures[rows[seed % len(rows)]]


def test_a_collapsed_generator_is_told_from_a_perfect_one(painted: Callable[..., Card]) -> None:
    healthy = painted(same_class)
    assert healthy.alarms == ()
    collapsed = painted(lambda real, number, seed: real.held_out.pictures[number])
    assert [alarm.partition(":")[0] for alarm in collapsed.alarms] == ["variety"]
    assert "of 3 of 3 prompts repeat" in collapsed.alarms[0]
    assert "(100% same)" in collapsed.alarms[0]
    assert collapsed.metrics["fd"] < healthy.metrics["fd"]  # distances do not see it


@pytest.mark.slow
def test_swapped_captions_are_told_by_adherence(painted: Callable[..., Card]) -> None:
    right = painted(lambda real, number, seed: real.held_out.pictures[number])
    swapped = painted(lambda real, number, seed: real.held_out.pictures[(number + 1) % 64])
    assert right.metrics["adherence_time"] > 0.85 > 0.5 > swapped.metrics["adherence_time"]
    assert right.metrics["adherence_all"] > 2 * swapped.metrics["adherence_all"]
    assert abs(right.metrics["fd"] - swapped.metrics["fd"]) < 1e-3  # the same pictures


@pytest.mark.slow
def test_blurred_pictures_are_ordered_by_distance(painted: Callable[..., Card]) -> None:
    def blurred(factor: int) -> Callable[[RealData, int, int], Tensor]:
        def paint(real: RealData, number: int, seed: int) -> Tensor:
            small = F.avg_pool2d(same_class(real, number, number)[None].float(), factor)
            return F.interpolate(small, (32, 32), mode="bilinear")[0].round().to(torch.uint8)

        return paint

    cards = [painted(blurred(factor)) for factor in (1, 8, 32)]
    for name in ("fd", "kid", "mmd"):
        figures = [card.metrics[name] for card in cards]
        assert figures == sorted(figures), name
    assert cards[2].metrics["coverage"] < cards[0].metrics["coverage"]


@pytest.mark.slow
def test_copies_of_training_pictures_are_told(painted: Callable[..., Card]) -> None:
    def copied(real: RealData, number: int, seed: int) -> Tensor:
        return real.train_set[number % 8].pixels

    card = painted(copied)
    assert card.metrics["memorization_copies"] >= 7 * 64 / 8
    told = [alarm for alarm in card.alarms if alarm.startswith("memorization: ")]
    assert "copy training pictures, such as" in told[0]
    assert "Copies of training pictures" in (Path("out") / "report.html").read_text()
