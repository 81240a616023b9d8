"""Distances against closed forms, torchmetrics and plain loops; the same on any number of threads."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from itertools import permutations

import pytest
import torch
from torch import Tensor, nn

from evaluation import metrics
from evaluation.metrics import (
    bootstrap,
    density_coverage,
    frechet_distance,
    half_samples,
    kernel_distance,
    mmd,
    polynomial_mmd,
    precision_recall,
)
from evaluation.mmd_variance import KernelSums, mmd_variance


def exact(N: int, D: int, rng: torch.Generator, mean: float, scale: float) -> Tensor:
    """Features whose sample mean and covariance are exactly `mean` and `scale^2` times the identity."""
    x = torch.randn(N, D, generator=rng, dtype=torch.float64)
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T.cov()), x.T, upper=False).T
    return scale * white + mean


def two_sets(rng: torch.Generator, N: int = 150, M: int = 200, D: int = 12) -> tuple[Tensor, Tensor]:
    """Correlated features of two overlapping clouds."""
    mix = torch.randn(D, D, generator=rng)
    return torch.randn(N, D, generator=rng) @ mix + 0.7, torch.randn(M, D, generator=rng) @ mix


class Given(nn.Identity):
    """Hands rows through as features, for torchmetrics."""

    num_features = 12


def test_frechet_is_the_closed_form_of_two_normal_distributions(rng: torch.Generator) -> None:
    one, other = exact(200, 6, rng, 0.0, 1.0), exact(150, 6, rng, 0.5, 3.0)
    assert frechet_distance(one, other) == pytest.approx(6 * 0.25 + 6 * (3 - 1) ** 2, rel=1e-9)
    assert frechet_distance(other, one) == pytest.approx(frechet_distance(one, other), rel=1e-9)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)


def test_frechet_agrees_with_the_root_of_the_product(rng: torch.Generator) -> None:
    one = torch.randn(300, 5, generator=rng) @ torch.randn(5, 5, generator=rng)
    other = torch.randn(300, 5, generator=rng) @ torch.randn(5, 5, generator=rng) + 1
    first, second = one.double().T.cov(), other.double().T.cov()
    root = torch.linalg.eigvals(first @ second).sqrt().real.sum()
    shift = (one.double().mean(0) - other.double().mean(0)).square().sum()
    wanted = shift + first.trace() + second.trace() - 2 * root
    assert frechet_distance(one, other) == pytest.approx(float(wanted), rel=1e-6)


@pytest.mark.slow  # torchmetrics takes ten seconds to be imported
@pytest.mark.filterwarnings("ignore:Metric .Kernel Inception Distance. will save:UserWarning")
def test_frechet_and_kernel_distance_are_those_of_torchmetrics(rng: torch.Generator) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    one, other = (features.double() for features in two_sets(rng, 200, 200))
    frechet = FrechetInceptionDistance(feature=Given()).set_dtype(torch.float64)
    kernel = KernelInceptionDistance(feature=Given(), subsets=1, subset_size=200)
    for metric in (frechet, kernel):
        metric.update(other, real=True)
        metric.update(one, real=False)
    assert frechet_distance(one, other) == pytest.approx(float(frechet.compute()), rel=1e-6)
    assert polynomial_mmd(one, other) == pytest.approx(float(kernel.compute()[0]), rel=1e-6)


def test_the_kernel_distance_is_a_plain_loop_over_different_pairs(rng: torch.Generator) -> None:
    one, two = ([*rows] for rows in two_sets(rng, 7, 9))

    def total(rows: list[Tensor], others: list[Tensor]) -> float:
        return sum((float(x.double() @ y.double()) / 12 + 1) ** 3 for x in rows for y in others if x is not y)

    within = [total(each, each) / (len(each) * (len(each) - 1)) for each in (one, two)]
    wanted = sum(within) - 2 * total(one, two) / (7 * 9)
    assert polynomial_mmd(torch.stack(one), torch.stack(two)) == pytest.approx(wanted, rel=1e-9)


def test_mmd_is_a_plain_loop_over_all_pairs(rng: torch.Generator) -> None:
    one, two = two_sets(rng, 7, 9)
    one, two = one / one.norm(dim=1, keepdim=True), two / two.norm(dim=1, keepdim=True)

    def mean(rows: Tensor, others: Tensor) -> float:
        values = [math.exp(-float((x - y).square().sum()) / 200) for x in rows for y in others]
        return sum(values) / len(values)

    wanted = 1_000 * (mean(one, one) + mean(two, two) - 2 * mean(one, two))
    assert mmd(one * 3, two) == pytest.approx(wanted, rel=1e-4)
    assert mmd(one, one) == pytest.approx(0, abs=1e-9)


def test_neighbours_are_those_of_plain_loops(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    generated, real = two_sets(rng, 40, 57, 3)
    generated[:4] += 100
    far = torch.cdist(generated.double(), real.double())

    def radii(rows: Tensor, k: int) -> Tensor:
        return torch.cdist(rows.double(), rows.double()).sort(1).values[:, k]

    monkeypatch.setattr(metrics, "_BLOCK", 16)  # so that there are several blocks, the last ones smaller
    precision, recall = precision_recall(generated, real, k=2)
    assert precision == sum((far[j] <= radii(real, 2)).any().item() for j in range(40)) / 40
    assert recall == sum((far[:, i] <= radii(generated, 2)).any().item() for i in range(57)) / 57
    assert 0 < precision <= 0.9
    density, coverage = density_coverage(generated, real)
    inside = far <= radii(real, 5)
    assert density == pytest.approx(inside.sum().item() / (5 * 40))
    assert coverage == inside.any(0).sum().item() / 57
    assert 0 < coverage < 1


def test_two_draws_of_one_distribution_are_perfect_and_a_collapsed_one_is_seen(rng: torch.Generator) -> None:
    one, real = torch.randn(1_000, 4, generator=rng), torch.randn(1_000, 4, generator=rng)
    precision, recall = precision_recall(one, real)
    density, coverage = density_coverage(one, real)
    assert min(precision, recall) > 0.85
    assert 0.9 < density < 1.1
    assert coverage > 0.9  # 1 - 2^-5 is expected
    collapsed = real[:1].repeat(1_000, 1)
    assert precision_recall(collapsed, real)[0] == 1.0
    assert precision_recall(collapsed, real)[1] < 0.01
    assert density_coverage(collapsed, real)[1] < 0.02


@pytest.mark.parametrize(
    ("shift", "high", "N", "M", "subset_size"),
    [(0.5, 1.2, 100, 100, 1_000), (0.0, 1.35, 100, 100, 1_000), (0.0, 1.35, 90, 60, 8)],
)
def test_the_standard_error_of_the_kernel_distance_is_its_spread(
    shift: float, high: float, N: int, M: int, subset_size: int, rng: torch.Generator
) -> None:
    """Whether sets differ or not, and whether pictures or subsets are few."""
    pairs = [(torch.randn(N, 8, generator=rng), torch.randn(M, 8, generator=rng) + shift) for _ in range(100)]
    found = [kernel_distance(*pair, 15, subset_size, seed) for seed, pair in enumerate(pairs)]
    values, errors = torch.tensor(found).T
    assert 0.85 < float(errors.mean() / values.std()) < high  # the spread of 100 is 7 % uncertain
    if not shift:
        assert abs(float(values.mean())) < 3 * float(values.std()) / 100**0.5  # equal sets give 0
    assert kernel_distance(*pairs[0], 15, subset_size) == found[0]
    assert kernel_distance(*pairs[0], 15, subset_size, seed=1)[0] != found[0][0]


def test_the_variance_of_the_discrepancy_is_a_plain_sum_over_different_pictures(rng: torch.Generator) -> None:
    one, two = torch.randn(6, 3, generator=rng).double(), torch.randn(5, 3, generator=rng).double() + 2

    def kernel(rows: Tensor, others: Tensor) -> Tensor:
        return (rows @ others.T / 3 + 1) ** 3

    def mean(numbers: Iterable[float]) -> float:
        values = list(numbers)
        return sum(values) / len(values)

    def parts(within: Tensor, across: Tensor) -> tuple[float, float]:
        """Variance of a single picture's part and of a pair's, each a mean over different pictures."""
        rows, others = range(len(across)), range(across.shape[1])
        fours, threes = list(permutations(rows, 4)), list(permutations(rows, 3))
        twos, pairs = list(permutations(rows, 2)), list(permutations(others, 2))
        own = mean(within[i, j] * within[i, k] for i, j, k in threes)
        squared = mean(within[i, j] * within[k, m] for i, j, k, m in fours)
        single = own - 2 * mean(within[i, j] * across[i, a] for i, j in twos for a in others)
        single += mean(across[i, a] * across[i, b] for i in rows for a, b in pairs) - squared
        single += 2 * mean(within[i, j] * across[k, a] for i, j, k in threes for a in others)
        single -= mean(across[i, a] * across[j, b] for i, j in twos for a, b in pairs)
        return single, mean(within[i, j] ** 2 for i, j in twos) - 2 * own + squared

    across = kernel(one, two)
    single, pair = parts(kernel(one, one), across)
    single_other, pair_other = parts(kernel(two, two), across.T)
    cells, rows, columns = across.numel(), list(permutations(range(6), 2)), list(permutations(range(5), 2))
    both = mean(float(each) ** 2 for each in across.flatten())
    both -= mean(across[i, a] * across[i, b] for i in range(6) for a, b in columns)
    both -= mean(across[i, a] * across[j, a] for i, j in rows for a in range(5))
    both += mean(across[i, a] * across[j, b] for i, j in rows for a, b in columns)
    doubles = 2 * pair / 30 + 2 * pair_other / 20 + 4 * both / cells
    wanted = float(4 * single / 6 + 4 * single_other / 5 + doubles)
    sums = [KernelSums.of(each) for each in (without(kernel(one, one)), without(kernel(two, two)), across)]
    assert wanted > 0
    assert mmd_variance(*sums) == pytest.approx(wanted, rel=1e-9)


def without(matrix: Tensor) -> Tensor:
    """A matrix without its diagonal."""
    return matrix.clone().fill_diagonal_(0)


def test_figures_do_not_depend_on_threads(rng: torch.Generator) -> None:
    one, two = torch.randn(2_200, 64, generator=rng), torch.randn(2_100, 64, generator=rng) + 0.1
    functions: list[Callable[..., object]] = [
        frechet_distance, partial(kernel_distance, subsets=5), mmd, precision_recall, density_coverage,
    ]  # fmt: skip
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        wanted = [function(one, two) for function in functions]
        torch.set_num_threads(2)
        assert [function(one, two) for function in functions] == wanted
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_memory_is_bounded_by_blocks(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    largest: list[int] = []
    products = metrics._squares

    def watched(one: Tensor, two: Tensor) -> Tensor:
        largest.append(len(one) * len(two))
        return products(one, two)

    monkeypatch.setattr(metrics, "_BLOCK", 64)
    monkeypatch.setattr(metrics, "_squares", watched)
    one, two = torch.randn(300, 4, generator=rng), torch.randn(200, 4, generator=rng)
    for function in (mmd, precision_recall, density_coverage):
        function(one, two)
    assert max(largest) == 64 * 64


def test_the_bootstrap_of_a_mean_is_the_normal_interval(rng: torch.Generator) -> None:
    values = torch.randn(400, 1, generator=rng, dtype=torch.float64) * 2 + 1
    interval = bootstrap(lambda rows: float(rows.mean()), values)
    half = 1.96 * float(values.std()) / 20
    assert interval.low == pytest.approx(float(values.mean()) - half, abs=0.1 * half)
    assert interval.high == pytest.approx(float(values.mean()) + half, abs=0.1 * half)
    narrow = bootstrap(lambda rows: float(rows.mean()), values, level=0.5)
    assert interval.low < narrow.low < narrow.high < interval.high
    assert bootstrap(lambda rows: float(rows.mean()), values) == interval
    assert bootstrap(lambda rows: float(rows.mean()), values, seed=1) != interval


def test_half_samples_hold_a_distance_of_many_pictures(rng: torch.Generator) -> None:
    """The distance of two known distributions, where repeated rows would put the interval beside it."""
    held, spreads, widths = 0, [], []
    for _ in range(60):
        one, two = torch.randn(300, 4, generator=rng), torch.randn(300, 4, generator=rng) + 0.5
        interval = half_samples(frechet_distance, one, two, resamples=60)
        spreads.append(frechet_distance(one, two))
        widths.append(interval.high - interval.low)
        # Its mean over many draws, too large by about 0.03 at this number of pictures.
        held += interval.low <= 1.0 + 0.025 <= interval.high
    assert 50 <= held <= 60
    expected = 2 * 1.96 * float(torch.tensor(spreads).std())
    assert sum(widths) / len(widths) == pytest.approx(expected, rel=0.25)


def test_half_samples_of_halves_that_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match="at least 2 rows"):
        half_samples(frechet_distance, torch.zeros(1, 3), torch.zeros(5, 3))
    with pytest.raises(ValueError, match="at least 1 rows"):
        bootstrap(lambda rows: 0.0, torch.zeros(0, 3))
    with pytest.raises(ValueError, match="level between 0 and 1"):
        bootstrap(lambda rows: 0.0, torch.zeros(3, 3), level=95)


@pytest.mark.parametrize(
    "distance", [frechet_distance, polynomial_mmd, kernel_distance, mmd, precision_recall, density_coverage]
)
def test_too_few_pictures_and_other_features(distance: Callable[[Tensor, Tensor], object]) -> None:
    with pytest.raises(ValueError, match="N of at least"):
        distance(torch.zeros(1, 3), torch.zeros(9, 3))
    with pytest.raises(ValueError, match="one D"):
        distance(torch.zeros(9, 3), torch.zeros(9, 4))
    with pytest.raises(ValueError, match="not finite"):
        distance(torch.full((9, 3), torch.nan), torch.zeros(9, 3))


def test_a_kernel_distance_needs_halves() -> None:
    with pytest.raises(ValueError, match="at least 4 pictures"):
        kernel_distance(torch.zeros(3, 2), torch.zeros(9, 2))
