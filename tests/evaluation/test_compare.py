"""Cards side by side: whole ones only, like ones only, with intervals that find a difference and no other."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from data.index import DataError
from data.landscapes import draw_scene, factors, render
from evaluation.asks import Ask, Real, prompts_sha256, varied
from evaluation.card import CARD, FEATURES, NEEDS, SETTINGS, Card, read_card, write_card, write_features
from evaluation.compare import compare, read, scores_of
from evaluation.features import PortionedFeatures
from evaluation.measure import Made, distances, measure_variety_of
from scripts.compare import main

Build = Callable[..., Path]
MEASURED: dict[str, Any] = {key: f"{key} of all" for keys in NEEDS.values() for key in keys}
MADE: dict[str, Any] = {
    **dict.fromkeys(SETTINGS, 1), "checkpoint_sha256": "0" * 64, "images_seen": 8, "code": {}, "torch": "2",
    "device": "cpu",
}  # fmt: skip


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Writes a card of random features: `build("a", shift=1.0, right=0.5)` returns its folder."""

    def make(name: str, shift: float = 0.0, right: float = 0.9, draw: int = 0, **changed: Any) -> Path:
        rng = torch.Generator().manual_seed(draw)
        reference = torch.randn(200, 8, generator=torch.Generator().manual_seed(99))
        made = torch.randn(200, 8, generator=rng) + shift
        scores = (torch.rand(200, generator=rng) < right).double()
        features = {"made": made, "reference": reference, "score_all": scores}
        figures = {**distances(made, reference), "adherence_all": float(scores.mean())}
        folder = tmp_path / name
        folder.mkdir()
        told = {key: changed.get(key, value) for key, value in MEASURED.items()}
        how = {key: changed.get(key, value) for key, value in MADE.items()}
        write_card(folder, Card(figures, told, how, (), write_features(folder, features)))
        return folder

    return make


def test_a_card_is_read_as_it_was_written(build: Build) -> None:
    folder = build("a")
    card = read_card(folder)
    before = (folder / CARD).read_bytes()
    write_card(folder, card)
    assert (folder / CARD).read_bytes() == before
    write_card(folder, replace(card, metrics={**card.metrics, "fd": float("nan")}))
    assert read_card(folder / CARD).metrics["fd"] != read_card(folder / CARD).metrics["fd"]


def test_a_changed_card_is_refused(build: Build, capsys: Any) -> None:
    one, other = build("a"), build("b")
    text = (one / CARD).read_text()
    document = json.loads(text)
    document["metrics"]["fd"] /= 2
    (one / CARD).write_text(json.dumps(document))
    assert main([str(one), str(other)]) == 3
    assert "was changed after it was written" in capsys.readouterr().err
    (one / CARD).write_text(text)
    data = bytearray((other / FEATURES).read_bytes())
    data[-1] ^= 1
    (other / FEATURES).write_bytes(data)
    assert main([str(one), str(other)]) == 3
    assert "is not the file that the card was written with" in capsys.readouterr().err
    (other / FEATURES).unlink()
    assert main([str(one), str(other)]) == 3
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_card_that_its_features_do_not_bear_out_is_refused(build: Build) -> None:
    folder = build("a")
    card = read_card(folder)
    write_card(folder, replace(card, metrics={**card.metrics, "fd": card.metrics["fd"] / 2}))
    with pytest.raises(DataError, match="but its features give"):
        read(folder)


@pytest.mark.parametrize("key", sorted({key for kind in ("distance", "adherence") for key in NEEDS[kind]}))
def test_unlike_cards_are_refused_and_the_difference_is_named(key: str, build: Build, capsys: Any) -> None:
    folders = [str(build("a")), str(build("b", **{key: "another"}))]
    assert main(folders) == 2
    captured = capsys.readouterr()
    assert f"{key} is {key} of all in card 1 and another in card 2" in captured.err
    assert len(captured.err.splitlines()) == 1
    assert captured.out == ""
    free = [kind for kind in ("distance", "adherence") if key not in NEEDS[kind]]
    if free:
        assert main([*folders, "--kinds", *free, "--resamples", "2"]) == 0


@pytest.mark.parametrize("key", SETTINGS)
def test_settings_may_differ_and_are_shown_unless_asked_strictly(key: str, build: Build, capsys: Any) -> None:
    words = [str(build("a")), str(build("b", **{key: 2})), "--kinds", "adherence", "--resamples", "2"]
    assert main(words) == 0
    assert f"{key}: 1 | 2" in capsys.readouterr().out
    assert main([*words, "--strict"]) == 2
    assert f"{key} is 1 in card 1 and 2 in card 2" in capsys.readouterr().err


def test_intervals_find_a_difference_and_no_other(build: Build) -> None:
    cards = [read(build("a")), read(build("b", draw=1)), read(build("c", shift=0.5, right=0.6, draw=2))]
    rows = {row.metric: row for row in compare(cards, ["distance", "adherence"], resamples=40)}
    for name in ("fd", "kid", "mmd", "adherence_all"):
        same, other = rows[name].differences[1:]
        assert same is not None
        assert same.low <= 0 <= same.high
        assert other is not None
        assert not other.low <= 0 <= other.high
        for value, interval in zip(rows[name].values, rows[name].intervals, strict=True):
            assert interval is not None
            assert interval.low < interval.high
            assert name == "kid" or interval.low <= value <= interval.high


def test_the_same_cards_give_the_same_text(build: Build, capsys: Any) -> None:
    words = [str(build("a")), str(build("b", shift=0.2)), "--resamples", "10"]
    assert main(words) == 0
    first = capsys.readouterr().out
    assert main(words) == 0
    assert capsys.readouterr().out == first
    assert "card 2 - card 1" in first


def test_every_mean_of_adherence_and_variety_is_borne_out() -> None:
    assert scores_of("adherence_all", {"score_all": torch.ones(2)}) is not None
    assert scores_of("variety_sameness", {"variety_sameness": torch.ones(2)}) is not None
    assert scores_of("variety_vendi_ratio", {"variety_vendi": torch.ones(2)}) is None


# --- what the figures are made of ---------------------------------------------------------------------------


def test_prompts_come_one_of_each_class_in_turn() -> None:
    asks = [Ask(text, text[0]) for text in ("a1", "a2", "a1", "b1", "a3", "b2", "c1")]
    assert [ask.text for ask in varied(asks, 5)] == ["a1", "b1", "c1", "a2", "b2"]
    assert len(varied(asks, 99)) == 6
    assert prompts_sha256(asks) != prompts_sha256(asks[::-1])


def test_a_collapsed_generator_raises_the_alarm_and_a_healthy_one_does_not() -> None:
    def shrunk(pictures: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool2d(pictures.float(), 4).flatten(1)

    network = PortionedFeatures("shrunk", "0", 48, "", 32, shrunk)
    scenes = [draw_scene(1, k) for k in range(160)]
    pictures = torch.stack([torch.from_numpy(render(each, 32)).permute(2, 0, 1) for each in scenes])
    asks = [Ask(str(k), factors(each)["time"]) for k, each in enumerate(scenes)]
    train = Real(pictures, tuple(asks), tuple(str(k) for k in range(160)))
    night = [k for k, ask in enumerate(asks) if ask.of_class == "night"][:8]
    ask = [Ask("by night", "night")]
    healthy = measure_variety_of(network, Made([], pictures[:0], ask, pictures[night], 8), train)
    assert healthy.alarms == []
    same = pictures[night[:1]].expand(8, -1, -1, -1)
    collapsed = measure_variety_of(network, Made([], pictures[:0], ask, same, 8), train)
    assert '"by night" (100% same)' in collapsed.alarms[0]
    assert collapsed.metrics["variety_different"] < 1.01 < healthy.metrics["variety_different"]
