"""Variety: the Vendi score in closed form, collapsed generators found, healthy and narrow ones not."""

import math
from collections.abc import Sequence
from dataclasses import asdict

import pytest
import torch
from torch import Tensor

from data.landscapes import draw_scene, factors, render
from evaluation.diversity import (
    Level,
    cosine_kernel,
    gaussian_kernel,
    measure_real,
    measure_variety,
    vendi_score,
)

COUNT, DIM = 16, 24


def real_features(classes: Sequence[str], each: int, rng: torch.Generator) -> tuple[Tensor, list[str]]:
    """Pictures of classes far from 0 and close together, as those of a classifier's features are."""
    rows = [10 + torch.randn(1, DIM, generator=rng) + torch.randn(each, DIM, generator=rng) for _ in classes]
    return torch.cat(rows), [name for name in classes for _ in range(each)]


def taken(
    real: Tensor, classes: Sequence[str], name: str, numbers: Sequence[int]
) -> tuple[Tensor, list[str], list[str]]:
    """(features, prompts, classes) of copies of real pictures of a class, by their numbers in it."""
    rows = torch.tensor([number for number, each in enumerate(classes) if each == name])[list(numbers)]
    return real[rows], [f"prompt of {name}"] * len(rows), [name] * len(rows)


@pytest.fixture
def reality(rng: torch.Generator) -> tuple[Tensor, list[str], dict[str, Level]]:
    real, classes = real_features(("hills", "sea"), 120, rng)
    return real, classes, measure_real(real[: 2 * 120], classes, COUNT)


def test_the_vendi_score_counts_groups_of_equal_pictures() -> None:
    orthogonal = torch.eye(8)
    assert vendi_score(cosine_kernel(orthogonal)) == pytest.approx(8)
    assert vendi_score(cosine_kernel(torch.ones(8, 3))) == pytest.approx(1)
    halves = orthogonal[[0, 0, 0, 0, 1, 1, 1, 1]]
    assert vendi_score(cosine_kernel(halves)) == pytest.approx(2)
    uneven = orthogonal[[0, 0, 0, 0, 0, 0, 1, 2]]  # eigenvalues 3/4, 1/8, 1/8
    shannon = -(0.75 * math.log(0.75) + 0.25 * math.log(0.125))
    assert vendi_score(cosine_kernel(uneven)) == pytest.approx(math.exp(shannon))
    assert vendi_score(cosine_kernel(uneven), 2) == pytest.approx(1 / (0.75**2 + 2 * 0.125**2))
    assert vendi_score(cosine_kernel(uneven), math.inf) == pytest.approx(4 / 3)
    assert vendi_score(cosine_kernel(uneven), 0) == pytest.approx(3)
    assert vendi_score(cosine_kernel(uneven), 1 + 1e-6) == pytest.approx(math.exp(shannon), rel=1e-5)


def test_kernels_are_what_they_are_called(rng: torch.Generator) -> None:
    x = torch.randn(5, 3, generator=rng, dtype=torch.float64)
    cosines = torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=-1)
    assert torch.allclose(cosine_kernel(x), cosines)
    distances = torch.cdist(x, x)
    assert torch.allclose(gaussian_kernel(distances, 2.0), (-(distances**2) / 8).exp())


def test_the_same_number_of_other_real_pictures_is_as_varied(
    reality: tuple[Tensor, list[str], dict[str, Level]], rng: torch.Generator
) -> None:
    real, classes, levels = reality
    features, prompts, of = taken(real, classes, "sea", range(60, 60 + COUNT))
    variety = measure_variety(features, prompts, of, levels)
    (row,) = variety.rows
    assert not variety.alarm
    assert not row.narrow
    assert row.sameness < 0.1
    assert row.level.count == COUNT
    assert row.level.pictures == 120
    assert 1 < row.level.collapsed < row.level.narrow < row.level.real.different <= COUNT


@pytest.mark.parametrize("different", [1, 2, 4])
def test_a_collapsed_generator_is_found(
    reality: tuple[Tensor, list[str], dict[str, Level]], rng: torch.Generator, different: int
) -> None:
    real, classes, levels = reality
    bad = taken(real, classes, "hills", [number % different for number in range(COUNT)])
    good = taken(real, classes, "sea", range(COUNT))
    noisy = bad[0] + 0.02 * torch.randn(bad[0].shape, generator=rng)
    for faulty in (bad[0], noisy):
        variety = measure_variety(torch.cat([good[0], faulty]), good[1] + bad[1], good[2] + bad[2], levels)
        assert variety.alarm
        assert [(row.of_class, row.collapsed) for row in variety.rows] == [("hills", True), ("sea", False)]
        assert variety.rows[0].pictures == tuple(range(COUNT, 2 * COUNT))
        assert variety.rows[0].made.different == pytest.approx(different, rel=0.1)
        assert variety.rows[0].sameness > 0.7
        assert variety.summary()["collapsed"] == 0.5
        assert variety.summary()["sameness"] == pytest.approx(
            (variety.rows[0].sameness + variety.rows[1].sameness) / 2
        )
    alone = measure_variety(*good, levels)
    assert not alone.alarm
    assert alone.summary()["collapsed"] == 0


def test_one_picture_a_prompt_is_all_the_same(reality: tuple[Tensor, list[str], dict[str, Level]]) -> None:
    real, classes, levels = reality
    row = measure_variety(*taken(real, classes, "sea", [7] * COUNT), levels).rows[0]
    assert row.sameness == pytest.approx(1, abs=1e-9)
    assert row.made.distance == 0
    assert row.made.vendi == pytest.approx(1)


def test_a_narrow_generator_is_called_so_and_raises_no_alarm(
    reality: tuple[Tensor, list[str], dict[str, Level]],
) -> None:
    real, classes, levels = reality
    features, prompts, of = taken(real, classes, "sea", range(COUNT))
    middle = features.mean(0)
    row = measure_variety(middle + 0.6 * (features - middle), prompts, of, levels).rows[0]
    assert row.narrow
    assert not row.collapsed
    assert 0.1 < row.sameness < 0.7


def test_figures_do_not_depend_on_order_or_threads(
    reality: tuple[Tensor, list[str], dict[str, Level]], rng: torch.Generator
) -> None:
    real, classes, levels = reality
    mixed = torch.randperm(len(real), generator=rng).tolist()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        again = measure_real(real[mixed], [classes[i] for i in mixed], COUNT)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert again == levels
    features, prompts, of = taken(real, classes, "sea", range(2 * COUNT))
    backwards = measure_variety(features.flip(0), prompts, of, levels)
    one = measure_variety(features, prompts, of, levels)
    assert asdict(backwards.rows[0].made) == asdict(one.rows[0].made)
    assert backwards.summary() == one.summary()
    assert measure_real(real, classes, COUNT, seed=1) != levels


def test_small_classes_are_compared_with_fewer_or_left_out(rng: torch.Generator) -> None:
    real, classes = real_features(("many", "some", "few"), 12, rng)
    keep = [number for number, name in enumerate(classes) if name != "few" or number % 2]
    levels = measure_real(real[keep], [classes[number] for number in keep], COUNT)
    assert {name: level.count for name, level in levels.items()} == {"many": 6, "some": 6}
    features = torch.randn(2 * COUNT + 5, DIM, generator=rng)
    prompts = ["a"] * COUNT + ["b"] * COUNT + ["c"] * 5
    variety = measure_variety(features, prompts, ["some"] * COUNT + ["few"] * COUNT + ["many"] * 5, levels)
    assert [row.prompt for row in variety.rows] == ["a"]
    assert variety.left_out == ("b", "c")
    empty = measure_variety(features, prompts, ["none"] * len(prompts), levels)
    assert not empty.alarm
    assert math.isnan(empty.summary()["sameness"])


def test_what_does_not_fit_is_refused(reality: tuple[Tensor, list[str], dict[str, Level]]) -> None:
    real, classes, levels = reality
    with pytest.raises(ValueError, match="at least 4"):
        measure_real(real, classes, 3)
    with pytest.raises(ValueError, match="give \\[N D\\] and N names"):
        measure_real(real, classes[1:], COUNT)
    with pytest.raises(ValueError, match="give it one"):
        measure_variety(real[:2], ["a", "a"], ["sea", "hills"], levels)
    broken = real.clone()
    broken[3, 4] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        measure_real(broken, classes, COUNT)
    with pytest.raises(ValueError, match="at least 0"):
        vendi_score(torch.eye(3), -1.0)


def test_pictures_repeated_by_a_generator_of_landscapes_are_found() -> None:
    """The same on pictures: small ones as they are, whose class is the hour."""
    scenes = [draw_scene(5, index) for index in range(400)]
    pictures = torch.stack([torch.from_numpy(render(scene, 32)).flatten().float() for scene in scenes])
    classes = [factors(scene)["time"] for scene in scenes]
    levels = measure_real(pictures[:300], classes[:300], 12)
    nights = [number for number in range(300, 400) if classes[number] == "night"][:12]
    days = [number for number in range(300, 400) if classes[number] == "noon"][:3] * 4
    numbers = torch.tensor(nights + days)
    of = [classes[number] for number in nights + days]
    variety = measure_variety(pictures[numbers], of, of, levels)
    assert [(row.prompt, row.collapsed) for row in variety.rows] == [("noon", True), ("night", False)]
    assert not variety.rows[1].narrow
