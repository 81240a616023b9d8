"""Distances between sets of pictures, on features that some network gives of them.

The formulas know no network: features are float `[N D]`. Used by `scripts/bench.py sampling`.
"""

import torch
from torch import Tensor


def frechet_distance(features: Tensor, others: Tensor) -> float:
    """The Frechet distance of the normal distributions fitted to `features` `[N D]` and `others` `[M D]`.

    `|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))` in float64 (Heusel et al. 2017, arXiv 1706.08500, eq. 6).
    The last trace is that of `(C1^(1/2) C2 C1^(1/2))^(1/2)`, which is symmetric. It grows as 1/N for few
    pictures: compare distances of equal N only.

    Raises:
        ValueError: fewer than two pictures on a side, or features of different widths.
    """
    if min(len(features), len(others)) < 2 or features.shape[1:] != others.shape[1:]:
        raise ValueError(
            f"features are {tuple(features.shape)} and {tuple(others.shape)}; give [N D] with N of at "
            "least 2 and one D"
        )
    one, two = features.double(), others.double()
    shift = (one.mean(0) - two.mean(0)).square().sum()
    first, second = one.T.cov(), two.T.cov()
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    return float(shift + first.trace() + second.trace() - 2 * cross)
