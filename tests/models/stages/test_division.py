"""How a global batch is cut, and what is said where it cannot be."""

from typing import Any

import pytest

from models.registry import ConfigError
from models.stages.compute import Reduce, TrainerOptions
from models.stages.division import Division, divide


def cut(batch_size: int, ranks: int, **options: Any) -> Division:
    return divide("plan.diffusion", batch_size, ranks, TrainerOptions(**options))


@pytest.mark.parametrize(
    ("batch_size", "ranks", "options", "parts", "micro_batch", "said"),
    [
        (64, 1, {}, 1, 64, "64 images"),
        (64, 4, {}, 1, 16, "64 images, on 4 ranks"),
        (64, 1, {"accumulate": 4}, 4, 16, "64 images, in 4 micro-batches of 16"),
        (64, 2, {"accumulate": 4}, 4, 8, "64 images, on 2 ranks, in 4 micro-batches of 8 each"),
        (60, 3, {"accumulate": 5}, 5, 4, "60 images, on 3 ranks, in 5 micro-batches of 4 each"),
        (64, 1, {"reduce": Reduce.tree}, 8, 8, "64 images, in 8 micro-batches of 8"),
        (64, 8, {"reduce": Reduce.tree}, 1, 8, "64 images, on 8 ranks"),
        (12, 2, {"reduce": Reduce.tree}, 2, 3, "12 images, on 2 ranks, in 2 micro-batches of 3 each"),
        (64, 2, {"reduce": Reduce.tree, "micro_batch": 2}, 16, 2, "64 images, on 2 ranks, in 16 "
         "micro-batches of 2 each"),
        (64, 2, {"reduce": Reduce.tree, "accumulate": 4}, 4, 8, "64 images, on 2 ranks, in 4 micro-batches "
         "of 8 each"),
        (64, 2, {"reduce": Reduce.tree, "accumulate": 2}, 4, 8, "64 images, on 2 ranks, in 4 micro-batches "
         "of 8 each"),
        (7, 1, {"reduce": Reduce.tree}, 1, 7, "7 images"),
    ],
)  # fmt: skip
def test_cuts(
    batch_size: int, ranks: int, options: dict[str, Any], parts: int, micro_batch: int, said: str
) -> None:
    division = cut(batch_size, ranks, **options)
    assert (division.parts, division.micro_batch, str(division)) == (parts, micro_batch, said)
    assert division.ranks * division.parts * division.micro_batch == batch_size


@pytest.mark.parametrize(
    ("batch_size", "ranks", "options", "said"),
    [
        (64, 6, {}, "plan.diffusion.batch_size is 64, the batch of all ranks, but does not divide by 6 "
         "ranks; give 60 or 66, or train on 4 or 8 ranks"),
        (4, 6, {}, "plan.diffusion.batch_size is 4, the batch of all ranks, but does not divide by 6 "
         "ranks; give 6, or train on 4 ranks"),
        (64, 2, {"accumulate": 5}, "trainer.accumulate is 5, but a rank's share of "
         "plan.diffusion.batch_size=64 is 32 images, which do not divide by it; give 4 or 8"),
        (64, 2, {"accumulate": 64}, "trainer.accumulate is 64, but a rank's share of "
         "plan.diffusion.batch_size=64 is 32 images, which do not divide by it; give 32"),
        (96, 3, {"reduce": Reduce.tree}, "trainer.reduce=tree adds up 8 micro-batches of 12 images "
         "(plan.diffusion.batch_size=96), which works on 1, 2, 4, 8 ranks and not on 3; give another number "
         "of ranks, a smaller trainer.micro_batch, or trainer.reduce=fast"),
        (64, 16, {"reduce": Reduce.tree}, "trainer.reduce=tree adds up 8 micro-batches of 8 images "
         "(plan.diffusion.batch_size=64), which works on 1, 2, 4, 8 ranks and not on 16; give another number "
         "of ranks, a smaller trainer.micro_batch, or trainer.reduce=fast"),
        (64, 1, {"reduce": Reduce.tree, "micro_batch": 6}, "trainer.micro_batch is 6, but for "
         "trainer.reduce=tree 1, 2, 4, ... of them must make plan.diffusion.batch_size=64; give 4 or 8"),
        (24, 2, {"reduce": Reduce.tree, "micro_batch": 6, "accumulate": 3}, "trainer.accumulate is 3, so "
         "that at most 4 of plan.diffusion.batch_size=24 images are computed at once, but "
         "trainer.reduce=tree computes micro-batches of 6; set trainer.micro_batch=3, or leave out "
         "trainer.accumulate"),
    ],
)  # fmt: skip
def test_what_cannot_be_cut(batch_size: int, ranks: int, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cut(batch_size, ranks, **options)
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"accumulate": 0}, "accumulate is 0, but must be at least 1"),
        ({"micro_batch": 4}, "micro_batch is 4, but is an option of reduce=tree; give accumulate instead"),
        ({"micro_batch": -1}, "micro_batch is -1, but must be 0 or more"),
        ({"check_ranks_every_images": -1}, "check_ranks_every_images is -1, but must be 0 or more"),
        ({"connect_timeout": 0.0}, "connect_timeout is 0.0, but must be a positive number of seconds"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TrainerOptions(**options)
