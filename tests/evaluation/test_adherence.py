"""The judge: deterministic training, honest scores, faithful saving. The full training is marked slow."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data.landscapes import FACTORS, draw_scene, factors, render
from evaluation.adherence import (
    JUDGE_SEEDS,
    AdherenceJudge,
    JudgeError,
    load_judge,
    save_judge,
    score,
    train_judge,
)

NAMES = ["time", "terrain", "light", "sky"]


def pictures(count: int, resolution: int = 64) -> tuple[Tensor, list[dict[str, str]]]:
    scenes = [draw_scene(77, index) for index in range(count)]
    pixels = np.stack([render(scene, resolution) for scene in scenes])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    return images, [factors(scene) for scene in scenes]


@pytest.fixture(scope="module")
def small() -> tuple[AdherenceJudge, dict[str, float]]:
    """A judge that has learnt for a few seconds only: better than chance, worse than a real one."""
    return train_judge(3, images=640, epochs=6)


def test_a_short_training_beats_chance_by_far(small: tuple[AdherenceJudge, dict[str, float]]) -> None:
    judge, accuracies = small
    assert set(accuracies) == {*NAMES, "all"}
    assert accuracies["time"] > 0.9
    assert accuracies["terrain"] > 0.6
    assert accuracies["light"] > 0.8
    assert accuracies["sky"] > 0.75
    assert accuracies["all"] <= min(accuracies[name] for name in NAMES)
    assert judge.card.accuracies == accuracies
    assert not judge.training


def test_training_is_a_function_of_the_seed(small: tuple[AdherenceJudge, dict[str, float]]) -> None:
    told: list[float] = []
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    first, accuracies = train_judge(1, images=128, epochs=1, progress=told.append)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is neither read nor moved
    assert torch.get_num_threads() == threads
    torch.rand(5)
    second, again = train_judge(1, images=128, epochs=1)
    assert accuracies == again
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(next(first.parameters()), next(small[0].parameters()))
    assert told == sorted(told)
    assert 0.98 < told[-1] <= 1.0


def test_predictions_are_ids_in_the_order_of_the_enums(
    small: tuple[AdherenceJudge, dict[str, float]],
) -> None:
    judge, _ = small
    images, wanted = pictures(64)
    predicted, probabilities = judge.predict(images), judge.probabilities(images)
    assert list(predicted) == NAMES
    for name, members in FACTORS.items():
        assert predicted[name].dtype == torch.int64
        assert predicted[name].shape == (64,)
        assert probabilities[name].shape == (64, len(members))
        torch.testing.assert_close(probabilities[name].sum(1), torch.ones(64))
    times = [list(FACTORS["time"])[i].value for i in predicted["time"].tolist()]
    assert sum(a == b["time"] for a, b in zip(times, wanted, strict=True)) > 55


def test_predictions_do_not_depend_on_the_batch(small: tuple[AdherenceJudge, dict[str, float]]) -> None:
    judge, _ = small
    images, _ = pictures(150)
    whole = judge.probabilities(images)["terrain"]
    torch.testing.assert_close(whole[140:141], judge.probabilities(images[140:141])["terrain"])


def test_larger_pictures_are_judged_alike(small: tuple[AdherenceJudge, dict[str, float]]) -> None:
    judge, _ = small
    images, wanted = pictures(48)
    large, _ = pictures(48, 128)
    assert abs(score(judge, large, wanted)["time"] - score(judge, images, wanted)["time"]) < 0.1
    assert judge.predict(F.avg_pool2d(images, 2))["time"].shape == (48,)


def test_scores_fall_for_wrong_captions_and_mirrored_pictures(
    small: tuple[AdherenceJudge, dict[str, float]],
) -> None:
    judge, _ = small
    images, wanted = pictures(256)
    right = score(judge, images, wanted)
    assert list(right) == [*NAMES, "all"]
    shuffled = score(judge, images, wanted[1:] + wanted[:1])
    assert shuffled["all"] < 0.15 < right["all"]
    assert shuffled["time"] < 0.4 < right["time"]
    mirrored = score(judge, images.flip(3), wanted)
    assert mirrored["light"] < 0.5 < right["light"]
    assert abs(mirrored["time"] - right["time"]) < 0.1


def test_all_counts_pictures_with_four_right_factors(
    small: tuple[AdherenceJudge, dict[str, float]],
) -> None:
    judge, _ = small
    images, _ = pictures(32)
    predicted = judge.predict(images)
    agreeing = [
        {name: list(FACTORS[name])[int(predicted[name][k])].value for name in NAMES} for k in range(32)
    ]
    assert set(score(judge, images, agreeing).values()) == {1.0}
    agreeing[0]["sky"] = "clear" if agreeing[0]["sky"] == "cloudy" else "cloudy"
    agreeing[1]["light"] = "left" if agreeing[1]["light"] != "left" else "right"
    shares = score(judge, images, agreeing)
    assert shares["sky"] == shares["light"] == 31 / 32
    assert shares["all"] == 30 / 32


def test_scores_refuse_what_they_cannot_count(small: tuple[AdherenceJudge, dict[str, float]]) -> None:
    judge, _ = small
    images, wanted = pictures(2)
    with pytest.raises(ValueError, match="one for each"):
        score(judge, images, wanted[:1])
    with pytest.raises(ValueError, match="one for each"):
        score(judge, images[:0], [])
    with pytest.raises(ValueError, match="caption 1: time is 'teatime'"):
        score(judge, images, [wanted[0], {**wanted[1], "time": "teatime"}])
    with pytest.raises(ValueError, match="at least"):
        train_judge(0, images=5)


def test_a_saved_judge_comes_back(small: tuple[AdherenceJudge, dict[str, float]], tmp_path: Path) -> None:
    judge, accuracies = small
    save_judge(judge, tmp_path / "judge")
    assert sorted(path.name for path in (tmp_path / "judge").iterdir()) == ["judge.json", "judge.safetensors"]
    state = torch.get_rng_state()
    loaded = load_judge(tmp_path / "judge")
    assert torch.equal(torch.get_rng_state(), state)
    images, _ = pictures(8)
    for name in NAMES:
        assert torch.equal(loaded.probabilities(images)[name], judge.probabilities(images)[name])
    assert loaded.card == judge.card
    assert loaded.card.seed == 3
    assert loaded.card.accuracies == accuracies
    assert not loaded.training


def test_damaged_and_foreign_judges_are_refused(
    small: tuple[AdherenceJudge, dict[str, float]], tmp_path: Path
) -> None:
    with pytest.raises(JudgeError, match="no judge can be read"):
        load_judge(tmp_path)
    save_judge(small[0], tmp_path)
    card = (tmp_path / "judge.json").read_text()
    (tmp_path / "judge.json").write_text(json.dumps({**json.loads(card), "landscapes_version": 0}))
    with pytest.raises(JudgeError, match="made by judge"):
        load_judge(tmp_path)
    (tmp_path / "judge.json").write_text(card)
    weights = bytearray((tmp_path / "judge.safetensors").read_bytes())
    weights[-7] ^= 1
    (tmp_path / "judge.safetensors").write_bytes(weights)
    with pytest.raises(JudgeError, match="SHA-256"):
        load_judge(tmp_path)


def test_the_seeds_of_the_judge_are_its_own() -> None:
    assert JUDGE_SEEDS > 2**32
    assert draw_scene(JUDGE_SEEDS, 0) != draw_scene(0, 0)
    assert draw_scene(JUDGE_SEEDS, 0).seed == 2**48


@pytest.mark.slow
def test_a_real_judge_reads_pictures_almost_without_error() -> None:
    judge, accuracies = train_judge(0)
    assert min(accuracies["time"], accuracies["terrain"]) >= 0.99
    assert min(accuracies["light"], accuracies["sky"]) >= 0.97
    images, wanted = pictures(512)
    blurred = F.interpolate(F.avg_pool2d(images, 2), (64, 64), mode="bilinear")
    noisy = images + 0.05 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    assert min(score(judge, images, wanted)["all"], score(judge, blurred, wanted)["all"]) > 0.96
    assert score(judge, noisy, wanted)["all"] > 0.96
