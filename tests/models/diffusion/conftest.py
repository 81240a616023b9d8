"""What the tests of diffusion's mathematics share: exact denoisers of data whose distribution is known."""

import pytest
import torch
from torch import Tensor

from models.diffusion.schedules import Schedule, expand

MEAN, STD = 0.6, 0.5
CENTRES, SHARES, SPREAD = (-1.0, 1.0), (0.3, 0.7), 0.1


class GaussianData:
    """The exact denoiser, float64, where clean data is normal with mean MEAN and deviation STD."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (expand(c.double(), x_t) for c in self.schedule(t))
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        return MEAN + gain * (x_t - alpha * MEAN)

    def exact(self, x: Tensor, start: float) -> Tensor:
        """Where the probability-flow ODE takes `x` at `start`: the same quantile of the data."""
        alpha, sigma = (c.double() for c in self.schedule(torch.tensor([start])))
        return MEAN + STD * (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2).sqrt()


class MixtureData:
    """The exact denoiser where data is -1 (30 %) or +1 (70 %) with deviation 0.1."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        centres, shares = torch.tensor(CENTRES), torch.tensor(SHARES)
        alpha, sigma = (expand(c, x_t) for c in self.schedule(t))
        variance = alpha**2 * SPREAD**2 + sigma**2
        weight = (shares.log() - (x_t - alpha * centres) ** 2 / (2 * variance)).softmax(-1)
        each = centres + alpha * SPREAD**2 / variance * (x_t - alpha * centres)
        return (weight * each).sum(-1, keepdim=True)


@pytest.fixture(scope="session")
def gaussian() -> type[GaussianData]:
    """Exact denoiser of a Gaussian: `gaussian(schedule)`."""
    return GaussianData


@pytest.fixture(scope="session")
def mixture() -> type[MixtureData]:
    """Exact denoiser of a two-point mixture: `mixture(schedule)`."""
    return MixtureData
