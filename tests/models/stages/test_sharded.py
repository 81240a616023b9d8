"""Over how many ranks a model is spread, and what of that is refused; tests/distributed has the ranks."""

from typing import Any

import pytest

from models.registry import ConfigError
from models.stages.compute import Reduce, Strategy, TrainerOptions
from models.stages.sharded import shards_of


@pytest.mark.parametrize(
    ("strategy", "shards", "size", "wanted"),
    [("auto", 0, 4, 1), ("ddp", 0, 4, 1), ("fsdp", 0, 4, 4), ("fsdp", 0, 1, 1), ("hsdp", 2, 4, 2)],
)
def test_a_model_is_spread_over(strategy: str, shards: int, size: int, wanted: int) -> None:
    assert shards_of(TrainerOptions(strategy=Strategy[strategy], shards=shards), size) == wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": Strategy.fsdp, "shards": 2}, "trainer.shards is 2, but trainer.strategy=fsdp"),
        ({"strategy": Strategy.hsdp}, "trainer.shards is 0, the ranks that trainer.strategy=hsdp spreads"),
        ({"strategy": Strategy.hsdp, "shards": 3}, "must be 2 or more and divide the 4 ranks"),
        ({"strategy": Strategy.fsdp, "reduce": Reduce.tree}, "adds up whole gradients"),
    ],
)
def test_shards_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shards_of(TrainerOptions(**options), 4)
