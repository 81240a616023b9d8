"""The Frechet distance against its closed form, and its refusals."""

import pytest
import torch

from evaluation.metrics import frechet_distance


def exact(N: int, D: int, rng: torch.Generator, mean: float, scale: float) -> torch.Tensor:
    """Features whose sample mean and covariance are exactly `mean` and `scale^2` times the identity."""
    x = torch.randn(N, D, generator=rng, dtype=torch.float64)
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T.cov()), x.T, upper=False).T
    return scale * white + mean


def test_it_is_the_closed_form_of_two_normal_distributions(rng: torch.Generator) -> None:
    one, other = exact(200, 6, rng, 0.0, 1.0), exact(150, 6, rng, 0.5, 3.0)
    assert frechet_distance(one, other) == pytest.approx(6 * 0.25 + 6 * (3 - 1) ** 2, rel=1e-9)
    assert frechet_distance(other, one) == pytest.approx(frechet_distance(one, other), rel=1e-9)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)


def test_it_agrees_with_the_root_of_the_product(rng: torch.Generator) -> None:
    one = torch.randn(300, 5, generator=rng) @ torch.randn(5, 5, generator=rng)
    other = torch.randn(300, 5, generator=rng) @ torch.randn(5, 5, generator=rng) + 1
    first, second = one.double().T.cov(), other.double().T.cov()
    root = torch.linalg.eigvals(first @ second).sqrt().real.sum()
    shift = (one.double().mean(0) - other.double().mean(0)).square().sum()
    wanted = shift + first.trace() + second.trace() - 2 * root
    assert frechet_distance(one, other) == pytest.approx(float(wanted), rel=1e-6)


def test_too_few_pictures_and_other_features() -> None:
    with pytest.raises(ValueError, match="N of at least 2"):
        frechet_distance(torch.zeros(1, 3), torch.zeros(5, 3))
    with pytest.raises(ValueError, match="one D"):
        frechet_distance(torch.zeros(5, 3), torch.zeros(5, 4))
