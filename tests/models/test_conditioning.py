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


def with_picture(rng: torch.Generator, batch: int) -> Conditioning:
    return make(rng, batch).with_image(torch.randn(batch, 2, 4, 4, generator=rng))


def test_the_picture_goes_along(rng: torch.Generator) -> None:
    conditioning = with_picture(rng, 3)
    assert conditioning.image is not None
    first, last = conditioning.split_last()
    assert torch.equal(first.image, conditioning.image[:2])  # type: ignore[arg-type]
    assert torch.equal(last.expand(4).image, conditioning.image[2:].expand(4, -1, -1, -1))  # type: ignore[arg-type]
    both = Conditioning.cat([last, first])
    assert torch.equal(both.image, conditioning.image[[2, 0, 1]])  # type: ignore[arg-type]
    assert torch.equal(conditioning.take(torch.tensor([2, 0])).image, conditioning.image[[2, 0]])  # type: ignore[arg-type]
    assert conditioning.to("meta").image.device.type == "meta"  # type: ignore[union-attr]


def test_replace_takes_the_picture_of_the_null_or_zeros(rng: torch.Generator) -> None:
    conditioning, where = with_picture(rng, 2), torch.tensor([True, False])
    assert conditioning.image is not None
    for null, wanted in ((make(rng, 1), torch.zeros(2, 4, 4)), (other := with_picture(rng, 1), None)):
        image = conditioning.replace(where, null).image
        assert image is not None
        assert torch.equal(image[0], wanted if wanted is not None else other.image[0])  # type: ignore[index]
        assert torch.equal(image[1], conditioning.image[1])
    with pytest.raises(ValueError, match="give both or neither"):
        make(rng, 2).replace(where, other)


def test_pictures_are_of_all_parts_or_of_none(rng: torch.Generator) -> None:
    with pytest.raises(ValueError, match="1 of 2 parts have a picture"):
        Conditioning.cat([with_picture(rng, 1), make(rng, 1)])
    with pytest.raises(ValueError, match="3 pictures for 2 texts"):
        make(rng, 2).with_image(torch.zeros(3, 2, 4, 4))
    assert Conditioning.cat([make(rng, 1), make(rng, 1)]).image is None
