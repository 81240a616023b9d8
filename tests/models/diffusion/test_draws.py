"""The counter-based generator: published vectors, independence of batching, and distribution."""

import pytest
import torch

from models.diffusion.draws import Draws, Purpose, philox


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_vectors(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    c0, c1, c2, c3 = (torch.tensor([c]) for c in counter)
    assert tuple(int(word) for word in philox((c0, c1, c2, c3), key)) == expected


def test_a_samples_numbers_do_not_depend_on_its_batch() -> None:
    together = Draws(7, torch.arange(100, 116)).normal(Purpose.NOISE, (4, 5, 3))
    for i in (0, 9, 15):
        alone = Draws(7, torch.tensor([100 + i])).normal(Purpose.NOISE, (4, 5, 3))
        assert torch.equal(alone[0], together[i])
    spread = Draws(7, torch.arange(100, 116)).spread(Purpose.TIME)
    assert torch.equal(spread[3:5], Draws(7, torch.tensor([103, 104])).spread(Purpose.TIME))


def test_seed_index_and_purpose_all_matter() -> None:
    def first(seed: int, index: int, purpose: Purpose) -> float:
        return Draws(seed, torch.tensor([index])).uniform(purpose).item()

    numbers = {
        first(seed, index, purpose)
        for seed in (0, 1, 2**32, 2**40)
        for index in (0, 1, 2**32, 2**40)
        for purpose in (Purpose.TIME, Purpose.NOISE)
    }
    assert len(numbers) == 32


def test_parts_of_a_purpose_are_independent_and_meet_no_other_purpose() -> None:
    draws = Draws(0, torch.arange(3))
    numbers = [
        draws.normal(purpose, (64,), part).flatten()
        for purpose in (Purpose.NOISE, Purpose.STEP_NOISE)
        for part in (0, 1, 2, 2**24 - 1)
    ]
    assert torch.equal(numbers[0], draws.normal(Purpose.NOISE, (64,)).flatten())
    together = torch.stack(numbers).double()
    assert len(together.unique()) == together.numel()
    assert (torch.corrcoef(together) - torch.eye(8)).abs().max() < 0.25
    assert torch.equal(
        numbers[5][64:128], Draws(0, torch.tensor([1])).normal(Purpose.STEP_NOISE, (64,), 1)[0]
    )
    assert max(Purpose) < 2**8
    for part in (-1, 2**24):
        with pytest.raises(ValueError, match=f"part is {part}"):
            draws.normal(Purpose.NOISE, (4,), part)


def test_normal_numbers_are_standard_normal() -> None:
    x = Draws(0, torch.arange(64)).normal(Purpose.NOISE, (4, 32, 32)).double()
    assert x.mean().abs() < 0.01
    assert (x.var() - 1).abs() < 0.01
    assert (x.pow(4).mean() - 3).abs() < 0.05
    flat = x.flatten(1)
    neighbours = torch.corrcoef(torch.stack((flat[:, :-1].flatten(), flat[:, 1:].flatten())))[0, 1]
    assert neighbours.abs() < 0.01
    assert torch.isfinite(x).all()


def test_spread_covers_every_batch_evenly() -> None:
    for start in (0, 12_345, 10**9):
        place = Draws(3, torch.arange(start, start + 64)).spread(Purpose.TIME).sort().values
        gaps = place.diff()
        assert gaps.max() < 3 / 64
        assert ((place > 0) & (place < 1)).all()
