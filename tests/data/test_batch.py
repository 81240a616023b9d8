"""A batch holds what its samples held, as bytes, and gives images in [-1, 1]."""

import pickle
from dataclasses import replace

import pytest
import torch

from data.batch import Batch, Collate
from data.shards import Sample


def tokenize(captions: list[str]) -> torch.Tensor:
    return torch.tensor([[len(caption), 7] for caption in captions])


def wrong(captions: list[str]) -> torch.Tensor:
    return torch.zeros(len(captions))


def samples() -> list[Sample]:
    return [
        Sample(10 + i, f"k{i}", torch.full((3, 4, 4), value, dtype=torch.uint8), "c" * i, {}, i == 1)
        for i, value in enumerate((0, 255, 51))
    ]


def test_collate_keeps_every_sample_in_its_place() -> None:
    batch = pickle.loads(pickle.dumps(Collate(tokenize)))(samples())
    assert (len(batch), batch.pixels.dtype, batch.pixels.shape) == (3, torch.uint8, (3, 3, 4, 4))
    assert batch.tokens.tolist() == [[0, 7], [1, 7], [2, 7]]
    assert batch.indices.tolist() == [10, 11, 12]
    assert (batch.captions, batch.keys, batch.substituted) == (["", "c", "cc"], ["k0", "k1", "k2"], 1)


def test_images_are_floats_between_minus_one_and_one() -> None:
    images = Collate(tokenize)(samples()).images
    assert (images.dtype, images.shape) == (torch.float32, (3, 3, 4, 4))
    assert images[:, 0, 0, 0].tolist() == pytest.approx([-1.0, 1.0, -0.6])


def test_to_moves_every_tensor() -> None:
    batch = Collate(tokenize)(samples()).to("meta")
    assert {batch.pixels.device.type, batch.tokens.device.type, batch.indices.device.type} == {"meta"}
    assert (batch.images.device.type, batch.keys) == ("meta", ["k0", "k1", "k2"])


@pytest.mark.gpu
def test_pinning_keeps_everything() -> None:
    batch = Collate(tokenize)(samples()).pin_memory()
    assert isinstance(batch, Batch)
    assert batch.pixels.is_pinned()


def test_a_wrong_tokenizer_is_named() -> None:
    with pytest.raises(ValueError, match=r"3 captions: tokenize gave torch.float32 \[3\], not int64 \[B L\]"):
        Collate(wrong)(samples())


def test_parts_make_the_batch_again() -> None:
    batch = Collate(tokenize)([*samples(), *samples()])
    text = (torch.rand(6, 2, 4), torch.ones(6, 2, dtype=torch.bool), torch.rand(6, 4))
    batch = replace(batch, text=text, before=batch.pixels + 1, moments=torch.rand(6, 8, 2, 2))
    parts = batch.parts(3)
    assert [len(part) for part in parts] == [2, 2, 2]
    for field in ("pixels", "tokens", "indices", "moments", "before"):
        assert torch.equal(torch.cat([getattr(part, field) for part in parts]), getattr(batch, field)), field
    for k, wanted in enumerate(text):
        assert torch.equal(torch.cat([part.text[k] for part in parts if part.text]), wanted)
    assert [key for part in parts for key in part.keys] == batch.keys
    assert [caption for part in parts for caption in part.captions] == batch.captions
    assert batch.parts(1) == [batch]


def test_parts_must_be_equal() -> None:
    with pytest.raises(ValueError, match="a batch of 3 samples does not divide by 2"):
        Collate(tokenize)(samples()).parts(2)
