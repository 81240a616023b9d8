"""Conditioning: dropout by replacement, views, batching of branches, devices."""

import pytest
import torch

from models.conditioning import Conditioning


def make(rng: torch.Generator, batch: int, length: int = 5, width: int = 8) -> Conditioning:
    return Conditioning(
        tokens=torch.randn(batch, length, width, generator=rng),
        mask=torch.rand(batch, length, generator=rng) > 0.5,
        pooled=torch.randn(batch, width, generator=rng),
    )


def test_replace_changes_only_the_chosen_samples(rng: torch.Generator) -> None:
    conditioning, null = make(rng, 4), make(rng, 1)
    replaced = conditioning.replace(torch.tensor([True, False, False, True]), null)
    for i in (0, 3):
        assert torch.equal(replaced.tokens[i], null.tokens[0])
        assert torch.equal(replaced.mask[i], null.mask[0])
        assert torch.equal(replaced.pooled[i], null.pooled[0])
    for i in (1, 2):
        assert torch.equal(replaced.tokens[i], conditioning.tokens[i])
        assert torch.equal(replaced.mask[i], conditioning.mask[i])
        assert torch.equal(replaced.pooled[i], conditioning.pooled[i])


def test_replace_carries_gradient_to_both_sides(rng: torch.Generator) -> None:
    conditioning, null = make(rng, 2), make(rng, 1)
    conditioning.tokens.requires_grad_()
    null.tokens.requires_grad_()
    conditioning.replace(torch.tensor([True, False]), null).tokens.sum().backward()
    assert conditioning.tokens.grad is not None
    assert conditioning.tokens.grad[0].abs().sum() == 0
    assert (conditioning.tokens.grad[1] == 1).all()
    assert null.tokens.grad is not None
    assert (null.tokens.grad == 1).all()


def test_replace_refuses_another_length(rng: torch.Generator) -> None:
    with pytest.raises(ValueError, match="same text encoder"):
        make(rng, 2).replace(torch.tensor([True, False]), make(rng, 1, length=4))


def test_expand_is_a_view_and_cat_keeps_the_order(rng: torch.Generator) -> None:
    null, conditioning = make(rng, 1), make(rng, 3)
    expanded = null.expand(3)
    assert expanded.batch_size == 3
    assert expanded.tokens.data_ptr() == null.tokens.data_ptr()
    both = Conditioning.cat([expanded, conditioning])
    assert both.batch_size == 6
    assert torch.equal(both.tokens[:3], expanded.tokens)
    assert torch.equal(both.mask[3:], conditioning.mask)
    assert torch.equal(both.pooled[3:], conditioning.pooled)


def test_expand_refuses_more_than_one_sample(rng: torch.Generator) -> None:
    with pytest.raises(RuntimeError):
        make(rng, 2).expand(4)


def test_to_moves_all_parts(rng: torch.Generator) -> None:
    moved = make(rng, 2).to("meta")
    assert {moved.tokens.device.type, moved.mask.device.type, moved.pooled.device.type} == {"meta"}
