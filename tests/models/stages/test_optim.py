"""The learning rate as a function of the images seen, and which weights decay."""

import pytest
import torch
from torch import nn

from models.stages.optim import AdamW, learning_rate_factor


def factor(seen: int, horizon: int = 1000, warmup: int = 100, cooldown: float = 0.5) -> float:
    return learning_rate_factor(seen, horizon, warmup, cooldown)


def test_it_rises_stays_and_falls_to_nothing() -> None:
    assert 0 < factor(0) < 0.011
    assert factor(50) == pytest.approx(51 / 101)
    assert factor(100) == factor(300) == factor(500) == 1
    assert factor(750) == pytest.approx(0.5)
    assert factor(1000) == 0
    assert factor(5000) == 0
    falling = [factor(seen) for seen in range(500, 1001, 10)]
    assert falling == sorted(falling, reverse=True)
    assert all(0 <= factor(seen) <= 1 for seen in range(0, 1200, 7))


def test_without_warm_up_or_cooldown() -> None:
    assert factor(0, warmup=0) == 1
    assert [factor(seen, cooldown=0.0) for seen in (100, 999)] == [1, 1]
    assert factor(500, warmup=0, cooldown=1.0) == pytest.approx(0.5)


def test_where_both_meet_neither_is_lost() -> None:
    assert factor(60, horizon=100, warmup=100, cooldown=1.0) < min(61 / 101, 0.5 * (1 + 0.81))


def test_vectors_do_not_decay() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.Linear(4, 2))
    network[2].weight.requires_grad_(False)
    optimizer = AdamW(lr=0.1, weight_decay=0.3).build(network)
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] == 0.3 for p in g["params"]}
    plain = {id(p) for g in optimizer.param_groups if g["weight_decay"] == 0 for p in g["params"]}
    assert decayed == {id(network[0].weight)}
    assert plain == {id(network[0].bias), id(network[1].weight), id(network[1].bias), id(network[2].bias)}


def test_the_decay_is_decoupled() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = AdamW(lr=0.1, weight_decay=0.5).of([weight])
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert weight.flatten().tolist() == pytest.approx([0.95] * 4)


@pytest.mark.parametrize(
    "values", [{"lr": 0.0}, {"lr": float("nan")}, {"beta1": 1.0}, {"weight_decay": -1.0}, {"eps": 0.0}]
)
def test_values_out_of_range(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        AdamW(**values)
