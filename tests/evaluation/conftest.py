"""Fixtures of the tests of evaluation."""

import numpy as np
import pytest
import torch
from torch import Tensor

from data.landscapes import draw_scene, render
from evaluation.adherence import AdherenceJudge, train_judge


@pytest.fixture(scope="session")
def quick_judge() -> AdherenceJudge:
    """A judge that has learnt for a few seconds only: better than chance, worse than a real one."""
    return train_judge(3, images=640, epochs=6)[0]


@pytest.fixture(scope="session")
def landscapes() -> Tensor:
    """The pictures uint8 `[600 3 64 64]` of scenes 0 to 599 of seed 77."""
    pixels = np.stack([render(draw_scene(77, index)) for index in range(600)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
