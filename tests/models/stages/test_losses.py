"""The reconstruction loss and PSNR against values worked out by hand."""

import math

import pytest
import torch

from models.stages.losses import Distance, ReconstructionLoss, half, psnr_db


def test_psnr() -> None:
    images = torch.zeros(3, 3, 4, 4)
    decoded = images.clone()
    decoded[0] += 0.2  # peak to peak is 2: 10 log10(4 / 0.04)
    decoded[1] += 5  # clipped to 1: 10 log10(4 / 1)
    assert psnr_db(decoded, images).tolist() == pytest.approx(
        [20.0, 10 * math.log10(4), 10 * math.log10(4e10)]
    )


def test_one_number_a_picture() -> None:
    images, decoded = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    decoded[1] = -0.5
    kl = torch.tensor([0.0, 64.0])
    l1 = ReconstructionLoss(Distance.l1, kl_weight=0.1)(decoded, images, kl, 32)
    l2 = ReconstructionLoss(Distance.l2, kl_weight=0.1)(decoded, images, kl, 32)
    assert l1.tolist() == pytest.approx([0.0, 0.5 + 0.1 * 2])
    assert l2.tolist() == pytest.approx([0.0, 0.25 + 0.1 * 2])


def test_the_weight_is_a_nat_a_latent_value() -> None:
    images, kl = torch.zeros(1, 3, 4, 4), torch.tensor([10.0])
    assert ReconstructionLoss(kl_weight=1.0)(images, images, kl, 5).item() == pytest.approx(2.0)
    assert ReconstructionLoss(kl_weight=0.0)(images, images, kl, 5).item() == 0


def test_half_a_picture_is_compared_with_what_half_its_latents_become() -> None:
    images = torch.zeros(2, 3, 6, 6)
    images[1, :, ::2] = 1.0  # rows of 1 and 0, half of each at half the size
    decoded = torch.zeros(2, 3, 2, 3)  # of latents with an odd side: the last rows have no counterpart
    loss = ReconstructionLoss(Distance.l2, half_size_weight=2.0)
    assert loss.at_half_size(decoded, images).tolist() == pytest.approx([0.0, 2 * 0.25])
    assert half(torch.arange(16.0).view(1, 1, 4, 4)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


@pytest.mark.parametrize("name", ["kl_weight", "half_size_weight"])
@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_out_of_range(name: str, weight: float) -> None:
    with pytest.raises(ValueError, match=name):
        ReconstructionLoss(**{name: weight})
