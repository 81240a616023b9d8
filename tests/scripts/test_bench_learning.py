"""The learning benchmark: arms share everything but what they change, and nothing is trained twice."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conf.cli import composed
from evaluation.adherence import AdherenceJudge, save_judge
from models.registry import ConfigError
from scripts.bench import main
from scripts.benches import learning
from scripts.benches.learning import DECIDES, difference, order, read_arms

#: A run of a second: networks of a few thousand weights, 16 pictures.
TINY = [
    "backbone.channels=[8,16]", "backbone.head_dim=8", "backbone.norm_groups=4", "text_encoder.width=8",
    "text_encoder.layers=1", "data.resolution=32", "autoencoder=f4c4", "optimizer/autoencoder=adamw",
    "optimizer/diffusion=adamw", "autoencoder.channels=[8,8]", "autoencoder.norm_groups=4",
    "plan.diffusion.batch_size=8", "trainer.precision=fp32", "trainer.compile=off", "sampling.num_steps=2",
]  # fmt: skip


@pytest.mark.slow
def test_the_arms_that_come_along_compose() -> None:
    arms = read_arms(Path(learning.__file__).with_suffix(".yaml"))
    assert len(arms) > 1
    told = [json.dumps({key: composed("train", *words)[key] for key in DECIDES}) for words in arms.values()]
    assert len(set(told)) == len(arms)


@pytest.mark.parametrize("text", ["", "- a", "a: b", "a: [1]", "a: [", "{}"])
def test_files_that_hold_no_arms(text: str, tmp_path: Path) -> None:
    path = tmp_path / "arms.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"arms\.yaml"):
        read_arms(path)


def test_an_order_has_each_picture_once_before_any_again() -> None:
    rows = order(5, 12, seed=3).tolist()
    assert sorted(rows[:5]) == sorted(rows[5:10]) == [0, 1, 2, 3, 4]
    assert len(rows) == 12
    assert rows == order(5, 12, seed=3).tolist() != order(5, 12, seed=4).tolist()


def test_differences_are_of_pairs() -> None:
    mean, error = difference([1.0, 11.0, 101.0], [0.0, 10.0, 99.0])
    assert mean == pytest.approx(4 / 3)
    assert error == pytest.approx(1 / 3)
    assert difference([3.0], [1.0]) == (2.0, None)


@pytest.mark.slow
def test_arms_are_trained_once_and_compared(
    make_run: Callable[..., Path], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    values = composed("train", *TINY)
    make_run(tmp_path / "run", {**values, "resolution": 32})
    save_judge(AdherenceJudge(), tmp_path / "judge")
    data = [*TINY, "rendered.images=24", "rendered.held_out=8"]
    arms = {"adamw": data, "again": [*data, "ema=halflife"], "muon": [*data, "optimizer/diffusion=muon"]}
    (tmp_path / "arms.yaml").write_text(json.dumps(arms))
    words = ["learning", "--arms", "arms.yaml", "--run", "run", "--folder", "out", "--images", "32"]

    assert main([*words, "--pictures", "4", "--seeds", "1"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    same, other = (found["arms"][name]["differences"] for name in ("again", "muon"))
    assert same["val_loss"] == [0.0, None]
    assert other["val_loss"][0] != 0
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["arm"] for line in lines] == ["adamw", "muon"]

    monkeypatch.setattr(learning.Bench, "measure", lambda *_: pytest.fail("trained again"))
    assert main([*words, "--pictures", "4", "--seeds", "1"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["arms"] == found["arms"]
    assert main([*words, "--run", "absent"]) == 4
    assert "no trained autoencoder" in capsys.readouterr().err
