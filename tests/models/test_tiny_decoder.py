"""The small decoder: sizes, a share of the autoencoder's work, and that it can learn to decode."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.autoencoder import Autoencoder
from models.tiny_decoder import TinyDecoder


@pytest.mark.parametrize(("factor", "size"), [(4, (3, 5)), (8, (2, 2)), (1, (4, 4))])
def test_it_gives_pictures_of_the_autoencoders_size(factor: int, size: tuple[int, int]) -> None:
    decoder = TinyDecoder(latent_channels=4, factor=factor, width=8, blocks=1)
    images = decoder(torch.randn(2, 4, *size))
    assert images.shape == (2, 3, size[0] * factor, size[1] * factor)
    assert images.dtype == torch.float32


def test_numbers_are_checked() -> None:
    for values in ({"width": 0}, {"blocks": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            TinyDecoder(4, 4, **values)


def test_it_is_less_work_than_the_autoencoders() -> None:
    def flops(decode: object) -> int:
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            assert callable(decode)
            decode(torch.randn(1, 4, 16, 16))
        return counter.get_total_flops()

    whole = Autoencoder(channels=(16, 32, 32), blocks_per_level=1, mid_attention=False, norm_groups=8)
    assert flops(TinyDecoder(4, 4)) < 0.5 * flops(whole.decode)


def test_it_learns_a_picture(rng: torch.Generator) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        decoder = TinyDecoder(4, 2, width=16, blocks=2)
    latents, wanted = torch.randn(4, 4, 4, 4, generator=rng), torch.rand(4, 3, 8, 8, generator=rng)
    optimizer = torch.optim.Adam(decoder.parameters(), 1e-2)
    history = []
    for _ in range(60):
        loss = (decoder(latents) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.1 * history[0]
