"""Distances between sets of pictures, on features that some network gives of them, and how sure they are.

The formulas know no network: features are float `[N D]`. All is computed in float64, in blocks of a fixed
size and on one thread, so that a figure is the same to its last digit on any number of threads, and 50,000
features of width 2,048 take no more memory than their own and some blocks.

    distance = frechet_distance(generated, real)
    value, standard_error = kernel_distance(generated, real)
    half_samples(frechet_distance, generated, real)  # its interval
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.mmd_variance import KernelSums, mmd_variance
from models.portions import one_thread

#: Rows of a block: a product of two is 32 MiB.
_BLOCK = 2_048
#: Of CMMD: the width of its kernel, and a factor that makes its values easy to read.
SIGMA, SCALE = 10.0, 1_000.0


def frechet_distance(features: Tensor, others: Tensor) -> float:
    """The Frechet distance of the normal distributions fitted to `features` `[N D]` and `others` `[M D]`.

    `|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))` in float64 (Heusel et al. 2017, arXiv 1706.08500, eq. 6).
    The last trace is that of `(C1^(1/2) C2 C1^(1/2))^(1/2)`, which is symmetric. It is too large by about 1/N
    for few pictures: compare distances of equal N only.

    Raises:
        ValueError: fewer than two pictures on a side, features of different widths, or not finite.
    """
    _check(features, others)
    with one_thread():
        (first_mean, first), (second_mean, second) = _moments(features), _moments(others)
        shift = (first_mean - second_mean).square().sum()
        values, vectors = torch.linalg.eigh(first)
        root = vectors * values.clamp(min=0).sqrt() @ vectors.T
        cross = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
        return float(shift + first.trace() + second.trace() - 2 * cross)


def polynomial_mmd(features: Tensor, others: Tensor) -> float:
    """The unbiased squared maximum mean discrepancy of `features` `[N D]` and `others` `[M D]`.

    Its kernel is `(x y / D + 1)^3` (Binkowski et al. 2018, arXiv 1801.01401, section 4; Gretton et al. 2012,
    eq. 3). Unbiased: its mean over draws of equal distributions is 0, so it can be negative.

    Raises:
        ValueError: as `frechet_distance`.
    """
    _check(features, others)
    with one_thread():
        return _unbiased(features, others)


def kernel_distance(
    generated: Tensor, real: Tensor, subsets: int = 100, subset_size: int = 1_000, seed: int = 0
) -> tuple[float, float]:
    """The kernel distance (KID) of `generated` `[N D]` and `real` `[M D]`, and its standard error.

    The mean of `polynomial_mmd` over `subsets` random subsets of `subset_size` on each side, at most half of
    the smaller side (Binkowski et al. 2018, arXiv 1801.01401). The mean over all subsets would be that of the
    whole sets, so the standard error is that of the whole sets (`evaluation.mmd_variance`) and that of a mean
    of so many subsets: how far the figure would be for other pictures and other subsets of them.

    Raises:
        ValueError: fewer than four pictures on a side, fewer than two subsets, or as `frechet_distance`.
    """
    _check(generated, real)
    smaller = min(len(generated), len(real))
    size = min(subset_size, smaller // 2)
    if size < 2 or subsets < 2:
        raise ValueError(
            f"kernel_distance: {smaller} pictures, {subsets} subsets of {subset_size}; give at least 4 "
            "pictures on each side, and 2 subsets of 2"
        )
    rng = torch.Generator().manual_seed(seed)
    with one_thread():
        values = torch.tensor(
            [_unbiased(_drawn(generated, size, rng), _drawn(real, size, rng)) for _ in range(subsets)],
            dtype=torch.float64,
        )
        variance = mmd_variance(_cubic_sums(generated), _cubic_sums(real), _cubic_sums(generated, real))
        return float(values.mean()), (variance + float(values.var()) / subsets) ** 0.5


def mmd(generated: Tensor, real: Tensor) -> float:
    """The maximum mean discrepancy of CMMD for `generated` `[N D]` and `real` `[M D]`, times 1,000.

    Rows are scaled to length 1; the kernel is `exp(-|x - y|^2 / (2 * 10^2))`, and pairs of a row with itself
    count, as in the published figures (Jayasumana et al. 2024, arXiv 2401.09603, eq. 4 and section 4). It is
    theirs where the features are those of CLIP ViT-L/14 at 336 pixels.

    Raises:
        ValueError: as `frechet_distance`.
    """
    _check(generated, real)
    with one_thread():
        within = [_kernel_sum(_gaussian, each, each) / len(each) ** 2 for each in (generated, real)]
        across = _kernel_sum(_gaussian, generated, real) / (len(generated) * len(real))
        return SCALE * (within[0] + within[1] - 2 * across)


def precision_recall(generated: Tensor, real: Tensor, k: int = 3) -> tuple[float, float]:
    """Precision and recall in [0, 1] of `generated` `[N D]` against `real` `[M D]`.

    The share of generated rows within the k-th neighbour's distance of some real row, and the other way
    about (Kynkaanniemi et al. 2019, arXiv 1904.06991, eq. 1 and 2). Both depend on N and M.

    Raises:
        ValueError: no more than `k` pictures on a side, or as `frechet_distance`.
    """
    _check(generated, real, k)
    with one_thread():
        of_real, of_generated = _radii(real, k), _radii(generated, k)
        inside = torch.zeros(len(generated), dtype=torch.bool)
        covered = torch.zeros(len(real), dtype=torch.bool)
        for rows, columns, squares in _blocks(generated, real):
            inside[rows] |= (squares <= of_real[columns]).any(1)
            covered[columns] |= (squares <= of_generated[rows, None]).any(0)
    return _share(inside), _share(covered)


def density_coverage(generated: Tensor, real: Tensor, k: int = 5) -> tuple[float, float]:
    """Density, 1 for a perfect generator and possibly more, and coverage in [0, 1].

    Each real row has a ball that reaches its k-th real neighbour. Density is the number of balls that a row
    of `generated` `[N D]` lies in, over k; coverage the share of the balls of `real` `[M D]` that hold a
    generated row (Naeem et al. 2020, arXiv 2002.09797, eq. 3 and 4).

    Raises:
        ValueError: no more than `k` pictures on a side, or as `frechet_distance`.
    """
    _check(generated, real, k)
    with one_thread():
        radii = _radii(real, k)
        balls = 0
        covered = torch.zeros(len(real), dtype=torch.bool)
        for _, columns, squares in _blocks(generated, real):
            inside = squares <= radii[columns]
            balls += int(inside.sum())
            covered[columns] |= inside.any(0)
    return balls / (k * len(generated)), _share(covered)


@dataclass(frozen=True)
class Interval:
    """The ends of an interval."""

    low: float
    high: float


def bootstrap(
    statistic: Callable[..., float], *sets: Tensor, resamples: int = 1_000, level: float = 0.95, seed: int = 0
) -> Interval:
    """The percentile bootstrap interval of `statistic(*sets)` (Efron 1979), for averages of rows.

    Each set `[N ...]` is drawn again from its own rows, as many and with repetition; what belongs together,
    as two checkpoints' scores of one prompt, goes into one row. Not for distances between sets of features:
    a repeated row is its own nearest neighbour, and makes them too large. `half_samples` is.

    Args:
        statistic: called with the sets drawn.
        sets: of rows.
        resamples: how many times they are drawn.
        level: the share in (0, 1) of the values drawn that the interval holds.
        seed: of the draws.

    Raises:
        ValueError: a set without rows, no resamples, or a level out of range.
    """
    _check_draws(sets, resamples, level, 1)
    rng = torch.Generator().manual_seed(seed)

    def again(rows: Tensor) -> Tensor:
        return rows[torch.randint(0, len(rows), (len(rows),), generator=rng)]

    with one_thread():
        return _central([statistic(*map(again, sets)) for _ in range(resamples)], level)


def half_samples(
    statistic: Callable[..., float], *sets: Tensor, resamples: int = 100, level: float = 0.95, seed: int = 0
) -> Interval:
    """The interval of `statistic(*sets)` from random halves of each set, for distances between sets.

    The delete-half jackknife (Shao and Wu 1989): halves drawn without repetition deviate from their mean as
    the whole sets deviate from the truth. Their mean is not that of the whole, as most distances depend on N,
    so the deviations are laid around `statistic(*sets)`. Arguments as of `bootstrap`.

    Raises:
        ValueError: a set of fewer than two rows, no resamples, or a level out of range.
    """
    _check_draws(sets, resamples, level, 2)
    rng = torch.Generator().manual_seed(seed)
    with one_thread():
        values = [statistic(*(_drawn(each, len(each) // 2, rng) for each in sets)) for _ in range(resamples)]
        moved = statistic(*sets) - sum(values) / len(values)
        return _central([value + moved for value in values], level)


def _check(features: Tensor, others: Tensor, k: int = 1) -> None:
    if features.ndim != 2 or features.shape[1:] != others.shape[1:] or min(len(features), len(others)) <= k:
        raise ValueError(
            f"features are {tuple(features.shape)} and {tuple(others.shape)}; give [N D] with N of at "
            f"least {k + 1} and one D"
        )
    if not (features.isfinite().all() and others.isfinite().all()):
        raise ValueError("features hold numbers that are not finite; look at the network they are from")


def _check_draws(sets: tuple[Tensor, ...], resamples: int, level: float, least: int) -> None:
    sizes = [len(each) for each in sets]
    if not sizes or min(sizes) < least or resamples < 1 or not 0 < level < 1:
        raise ValueError(
            f"sets of {sizes} rows, {resamples} resamples, level {level}; give at least {least} rows in each "
            "set, one resample, and a level between 0 and 1"
        )


def _parts(rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The rows in blocks of float64, each with where it lies."""
    for first in range(0, len(rows), _BLOCK):
        yield slice(first, first + _BLOCK), rows[first : first + _BLOCK].double()


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `[D]` and covariance `[D D]`."""
    D = features.shape[1]
    mean, products = torch.zeros(D, dtype=torch.float64), torch.zeros(D, D, dtype=torch.float64)
    for _, part in _parts(features):
        mean += part.sum(0) / len(features)
    for _, part in _parts(features):
        centred = part - mean
        products.addmm_(centred.T, centred)
    return mean, products / (len(features) - 1)


def _drawn(rows: Tensor, size: int, rng: torch.Generator) -> Tensor:
    """So many of the rows, drawn without repetition."""
    return rows[torch.randperm(len(rows), generator=rng)[:size]]


def _cubic(one: Tensor, two: Tensor) -> Tensor:
    return (one @ two.T).div_(one.shape[1]).add_(1).pow_(3)


def _gaussian(one: Tensor, two: Tensor) -> Tensor:
    return _squares(F.normalize(one), F.normalize(two)).div_(-2 * SIGMA**2).exp_()


def _squares(one: Tensor, two: Tensor) -> Tensor:
    """Squared distances `[N M]`; 0 where rounding would make one negative."""
    lengths = one.square().sum(1)[:, None] + two.square().sum(1)
    return lengths.sub_(one @ two.T, alpha=2).clamp_(min=0)


def _kernel_sum(kernel: Callable[[Tensor, Tensor], Tensor], one: Tensor, two: Tensor) -> float:
    return sum(float(kernel(part, other).sum()) for _, part in _parts(one) for _, other in _parts(two))


def _kernel_mean(kernel: Callable[[Tensor, Tensor], Tensor], rows: Tensor) -> float:
    """The mean over all pairs of different rows."""
    total = 0.0
    for where, part in _parts(rows):
        for columns, other in _parts(rows):
            values = kernel(part, other)
            total += float((values.fill_diagonal_(0) if where == columns else values).sum())
    return total / (len(rows) * (len(rows) - 1))


def _unbiased(one: Tensor, two: Tensor) -> float:
    across = _kernel_sum(_cubic, one, two) / (len(one) * len(two))
    return _kernel_mean(_cubic, one) + _kernel_mean(_cubic, two) - 2 * across


def _cubic_sums(one: Tensor, other: Tensor | None = None) -> KernelSums:
    """The sums of the kernel of two sets, or of one with itself without the diagonal."""
    two = one if other is None else other
    rows, columns = (torch.zeros(len(each), dtype=torch.float64) for each in (one, two))
    squares = 0.0
    for where, part in _parts(one):
        for places, some_two in _parts(two):
            values = _cubic(part, some_two)
            own = other is None and where == places
            some = KernelSums.of(values.fill_diagonal_(0) if own else values)
            rows[where] += some.rows
            columns[places] += some.columns
            squares += some.squares
    return KernelSums(rows, columns, squares)


def _blocks(one: Tensor, two: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Squared distances of all pairs, a block at a time, with the rows of `one` and of `two` it is of."""
    for rows, part in _parts(one):
        for columns, other in _parts(two):
            yield rows, columns, _squares(part, other)


def _radii(rows: Tensor, k: int) -> Tensor:
    """The squared distance `[N]` of each row to its k-th nearest other row."""
    nearest = torch.full((len(rows), k), torch.inf, dtype=torch.float64)
    for where, columns, squares in _blocks(rows, rows):
        if where == columns:
            squares.fill_diagonal_(torch.inf)
        nearest[where] = torch.cat([nearest[where], squares], 1).topk(k, 1, largest=False, sorted=True)[0]
    return nearest[:, -1]


def _share(chosen: Tensor) -> float:
    return int(chosen.sum()) / len(chosen)


def _central(values: list[float], level: float) -> Interval:
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(torch.tensor(values, dtype=torch.float64), ends).tolist()
    return Interval(low, high)
