"""The distance of small pictures: the definition, and what is no distance."""

import itertools

import torch
import torch.nn.functional as F

from evaluation.pixel_distance import SHIFT, pixel_distances


def test_pixel_distances_are_those_of_the_definition(rng: torch.Generator) -> None:
    one = torch.randint(0, 256, (3, 12, 12), generator=rng, dtype=torch.uint8)
    others = torch.randint(0, 256, (5, 3, 12, 12), generator=rng, dtype=torch.uint8)
    side = 12 - 5 - 2 * SHIFT
    blurs = [torch.tensor(each).double() / 10 for each in ([2.0, 2, 2, 2, 2, 0], [1.0, 2, 2, 2, 2, 1])]
    wanted = []
    for other in others:
        sharp = other.double().unfold(1, 6, 1).unfold(2, 6, 1)
        there = torch.einsum("cyxij,i,j->cyx", sharp, blurs[0], blurs[0])
        ratios = []
        for way, (vertical, horizontal) in itertools.product(
            (one, one.flip(-1)), itertools.product(blurs, blurs)
        ):
            mine = torch.einsum(
                "cyxij,i,j->cyx", way.double().unfold(1, 6, 1).unfold(2, 6, 1), vertical, horizontal
            )
            a = mine[:, SHIFT : SHIFT + side, SHIFT : SHIFT + side]
            x = a - a.mean((1, 2), keepdim=True)
            for down, right in itertools.product(range(2 * SHIFT + 1), repeat=2):
                b = there[:, down : down + side, right : right + side]
                y = b - b.mean((1, 2), keepdim=True)
                ratios.append((x - y).norm() / (x.norm() ** 2 + y.norm() ** 2).sqrt())
        wanted.append(min(ratios))
    assert torch.allclose(pixel_distances(one, others), torch.stack(wanted))
    assert pixel_distances(one, others[:0]).shape == (0,)


def test_a_shift_a_mirror_and_a_tint_are_no_distance(rng: torch.Generator) -> None:
    big = torch.randint(20, 200, (3, 36, 36), generator=rng, dtype=torch.uint8)
    one = big[:, 2:34, 2:34]
    same = torch.stack([big[:, 0:32, 4:36], one.flip(-1), one + 30, one])
    assert pixel_distances(one, same).tolist() == [0, 0, 0, 0]
    further = F.pad(big, (6, 0, 0, 0))[:, 2:34, 2:34]  # by six, which is too far
    assert pixel_distances(one, further[None])[0] > 0.5
    halves = F.avg_pool2d(big.double(), (1, 2), 1)[:, 2:34, 2:34].round().to(torch.uint8)
    assert 0 < pixel_distances(one, halves[None])[0] < 0.2
    flat = torch.full((1, 3, 32, 32), 7, dtype=torch.uint8)
    assert pixel_distances(flat[0], flat).tolist() == [0]
