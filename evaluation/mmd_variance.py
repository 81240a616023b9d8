"""How much the unbiased squared maximum mean discrepancy of two sets varies from draw to draw of them.

The estimate is a U-statistic. It is the sum of parts that are uncorrelated (Hoeffding 1948): for each set one
of its single pictures, and for each two pictures, of one set or of both, one of the pair. Where the sets do
not differ the parts of single pictures are 0, and the error falls as 1/N; else it falls as 1/sqrt(N). Each
part's variance is a combination of products of means of the kernel, and those are estimated without bias from
pictures that are all different (Sutherland and Deka 2019, arXiv 1906.02104).

    mmd_variance(KernelSums.of(within), KernelSums.of(within_other), KernelSums.of(across)) ** 0.5
"""

from dataclasses import dataclass
from typing import Self

from torch import Tensor


@dataclass(frozen=True)
class KernelSums:
    """A kernel matrix `[N M]` summed over its rows `[N]` and columns `[M]`, and the sum of its squares.

    Of a set with itself the diagonal does not count.
    """

    rows: Tensor
    columns: Tensor
    squares: float

    @classmethod
    def of(cls, values: Tensor) -> Self:
        """Those of a matrix float64 `[N M]`."""
        return cls(values.sum(1), values.sum(0), float(values.square().sum()))


def mmd_variance(one: KernelSums, other: KernelSums, across: KernelSums) -> float:
    """The variance of `mean(one) + mean(other) - 2 mean(across)`, not negative.

    `one` and `other` are of kernels `[N N]` and `[M M]` without their diagonals, `across` is of `[N M]`; N
    and M are at least 4. The estimate is unbiased, but for the part of single pictures: where chance would
    make that negative it is 0, and for sets that do not differ the error is then up to a fifth too large.
    """
    N, M, total = len(across.rows), len(across.columns), float(across.rows.sum())
    squared = total**2 - _square(across.rows) - _square(across.columns) + across.squares
    mean_across = squared / (N * (N - 1) * M * (M - 1))  # squared
    first, pairs, given = _parts(one, across.rows, across.squares, total, mean_across, M)
    first_other, pairs_other, given_other = _parts(
        other, across.columns, across.squares, total, mean_across, N
    )
    pairs_across = across.squares / (N * M) - given - given_other + mean_across
    singles = 4 * first / N + 4 * first_other / M
    doubles = 2 * pairs / (N * (N - 1)) + 2 * pairs_other / (M * (M - 1)) + 4 * pairs_across / (N * M)
    return max(singles, 0.0) + max(doubles, 0.0)


def _parts(
    within: KernelSums, across: Tensor, squares: float, total: float, mean_across: float, others: int
) -> tuple[float, float, float]:
    """Of one set: the variance of its single pictures' part, of its pairs', and `E[E[k(x, y) | x]^2]`."""
    N = len(within.rows)
    pairs, triples = N * (N - 1), N * (N - 1) * (N - 2)
    sum_within, square, product = (
        float(within.rows.sum()),
        _square(within.rows),
        float(within.rows @ across),
    )
    given = (square - within.squares) / triples  # E[E[k(x, x') | x]^2]
    given_across = (_square(across) - squares) / (N * others * (others - 1))
    both = product / (pairs * others)  # E[E[k(x, x') | x] E[k(x, y) | x]]
    mean = (sum_within**2 - 4 * square + 2 * within.squares) / (triples * (N - 3))  # E[k(x, x')]^2
    means = (sum_within * total - 2 * product) / (triples * others)  # E[k(x, x')] E[k(x, y)]
    singles = given - 2 * both + given_across - (mean - 2 * means + mean_across)
    return singles, within.squares / pairs - 2 * given + mean, given_across


def _square(sums: Tensor) -> float:
    return float(sums @ sums)
