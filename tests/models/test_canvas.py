"""Masks keep what is known to the bit, blend within the feather and nowhere else."""

import pytest
import torch
from torch import Tensor

from models.canvas import composite, extended, soften, to_latents


@pytest.fixture
def mask() -> Tensor:
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 20:] = 1
    return mask


@pytest.mark.parametrize("feather", [0, 1, 2, 3, 4, 7, 8])
def test_a_soft_edge_reaches_as_far_as_it_says(mask: Tensor, feather: int) -> None:
    soft = soften(mask, feather)
    assert (soft[..., 20:] == 1).all()
    assert (soft[..., : 20 - feather] == 0).all()
    assert (soft[0, 0, 5].diff() >= 0).all()
    assert feather < 2 or 0 < soft[0, 0, 5, 19] <= 1
    assert (soften(torch.ones(1, 1, 8, 8), feather) == 1).all()
    assert (soften(torch.zeros(1, 1, 8, 8), feather) == 0).all()


def test_latents_are_painted_where_any_of_their_pixels_is(mask: Tensor) -> None:
    mask[..., 19] = 0.25
    assert to_latents(mask, 4)[0, 0, 0].tolist() == [0, 0, 0, 0, 0.25, 1, 1, 1]


def test_composites(mask: Tensor, rng: torch.Generator) -> None:
    painted, known = (torch.randint(0, 256, (1, 3, 32, 32), generator=rng).to(torch.uint8) for _ in "ab")
    mixed = composite(painted, known, mask)
    assert torch.equal(mixed[..., :20], known[..., :20])
    assert torch.equal(mixed[..., 20:], painted[..., 20:])
    half = composite(painted, known, torch.full_like(mask, 0.5)).float()
    assert (half - (painted.float() + known.float()) / 2).abs().max() <= 0.5


def test_a_larger_canvas() -> None:
    image = torch.arange(12, dtype=torch.uint8).reshape(1, 3, 4).expand(3, -1, -1)
    canvas, mask = extended(image, 2, 0, 1, 3)
    assert canvas.shape == (3, 6, 7)
    assert torch.equal(canvas[:, :3, 2:6], image)
    assert canvas[0, 0].tolist() == [0, 0, 0, 1, 2, 3, 3]
    assert mask[:3, 2:6].max() == 0
    assert mask.sum() == 6 * 7 - 12
    with pytest.raises(ValueError, match="extend: top is -1 pixels, but must not be negative"):
        extended(image, 0, -1, 0, 0)
