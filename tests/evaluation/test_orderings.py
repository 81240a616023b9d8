"""Planted faults in rendered landscapes: the worse the pictures, the larger every distance by the judge."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from evaluation.adherence import AdherenceJudge
from evaluation.features import judge_features
from evaluation.metrics import (
    density_coverage,
    frechet_distance,
    kernel_distance,
    mmd,
    precision_recall,
)

#: Strong enough for a judge of a few seconds, which is taught not to mind a little; a real one sees half.
FAULTS: dict[str, tuple[Callable[[Tensor, float], Tensor], tuple[float, ...]]] = {
    "blurred": (
        lambda x, sigma: gaussian_blur(gaussian_blur(x, [63, 1], sigma), [1, 63], sigma),
        (4.0, 8.0, 16.0),
    ),
    "noised": (
        lambda x, sigma: x + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)),
        (32.0, 64.0, 128.0),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_worse_the_pictures_the_larger_the_distance(
    quick_judge: AdherenceJudge, landscapes: Tensor, fault: str
) -> None:
    network = judge_features(quick_judge)
    real, others = network.features(landscapes[:300]), landscapes[300:]
    spoil, levels = FAULTS[fault]
    sets = [network.features(others)]
    sets += [network.features(spoil(others.float(), level).round().clamp(0, 255).byte()) for level in levels]
    for distance in (frechet_distance, lambda *pair: kernel_distance(*pair, subsets=20)[0], mmd):
        values = [distance(features, real) for features in sets]
        assert values == sorted(values)
        assert values[-1] > 2 * values[0]
    for share in (lambda *pair: precision_recall(*pair)[0], lambda *pair: density_coverage(*pair)[1]):
        values = [share(features, real) for features in sets]
        assert values == sorted(values, reverse=True)
        assert values[-1] < 0.9 * values[0]
