"""Replicas are compared: any changed bit is found, and the rank and the tensor are named."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from models.stages.callbacks import CheckRanks
from models.stages.ranks import Ranks
from models.stages.replicas import RanksDiffer, checksum, differing
from tests.models.stages.together import Threads, together

MakeStage = Callable[..., Any]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]
)
def test_a_checksum_is_of_the_bits_and_their_places(dtype: torch.dtype, rng: torch.Generator) -> None:
    tensor = torch.randint(0, 2, (5, 4, 3), generator=rng).to(dtype)
    again = tensor.clone()
    assert checksum(tensor) == checksum(again)
    for place in range(tensor.numel()):
        again.flatten()[place] = not tensor.flatten()[place]
        assert checksum(tensor) != checksum(again)
        again = tensor.clone()
    assert checksum(tensor) != checksum(tensor.flip(0))


def test_every_bit_counts_and_none_that_is_not_a_number_hides(rng: torch.Generator) -> None:
    tensor = torch.randn(16, generator=rng)
    tensor[3] = float("nan")
    seen = {int(checksum(tensor))}
    for bit in range(32):
        other = tensor.clone()
        other.view(torch.int32)[3] ^= torch.tensor(1 << bit).to(torch.int32)
        seen.add(int(checksum(other)))
    assert len(seen) == 33


def test_layout_does_not_matter(rng: torch.Generator) -> None:
    tensor = torch.randn(2, 8, 5, 5, generator=rng)
    assert checksum(tensor.contiguous(memory_format=torch.channels_last)) == checksum(tensor)


def test_every_portion_counts_and_has_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.stages.replicas._PORTION", 7)
    tensor = torch.arange(1.0, 51.0)
    seen = {int(checksum(tensor)), int(checksum(tensor.roll(7)))}
    for place in range(50):
        other = tensor.clone()
        other[place] = 0.0
        seen.add(int(checksum(other)))
    assert len(seen) == 52


@pytest.mark.parametrize(
    ("size", "flipped", "named"),
    [(4, [2], [2]), (4, [], None), (2, [1], [0, 1]), (4, [0, 3], [0, 1, 2, 3]), (5, [0, 3], [0, 3])],
)
def test_the_minority_is_named(size: int, flipped: list[int], named: list[int] | None) -> None:
    def compare(ranks: Threads) -> dict[str, list[int]]:
        tensors = {"a": torch.ones(3), "b": torch.arange(4.0)}
        if ranks.rank in flipped:
            tensors["b"].view(torch.int32)[2] ^= 1
        return differing(tensors, ranks)

    assert together(size, compare) == [{"b": named} if named else {}] * size


def test_two_ranks_that_differ_in_other_tensors_are_both_named() -> None:
    def compare(ranks: Threads) -> dict[str, list[int]]:
        return differing({"a": torch.tensor([ranks.rank == 1]), "b": torch.tensor([ranks.rank == 3])}, ranks)

    assert together(5, compare) == [{"a": [1], "b": [3]}] * 5


def test_the_run_ends_with_names_and_says_since_when(make_stage: MakeStage) -> None:
    stages = [make_stage("autoencoder") for _ in range(3)]

    def check(ranks: Threads) -> str:
        stage = stages[ranks.rank]
        callback = CheckRanks(stage, 8, ranks)
        stage.images_seen = 8
        callback.on_train_batch_end(None, None, None, None, 0)  # type: ignore[arg-type]
        if ranks.rank == 2:
            with torch.no_grad():
                for name in ("encoder.conv_in.weight", "decoder.conv_out.bias"):
                    stage.autoencoder.get_parameter(name).add_(1e-6)
        stage.images_seen = 12  # no multiple of 8 was crossed
        callback.on_train_batch_end(None, None, None, None, 0)  # type: ignore[arg-type]
        stage.images_seen = 16
        with pytest.raises(RanksDiffer) as caught:
            callback.on_train_batch_end(None, None, None, None, 0)  # type: ignore[arg-type]
        return str(caught.value)

    assert set(together(3, check)) == {
        "stage autoencoder at 16 images: the ranks no longer have the same weights: "
        "autoencoder.encoder.conv_in.weight of rank 2, autoencoder.decoder.conv_out.bias of rank 2; all "
        "agreed at 8 images; a device or its memory erred: test it, remove the checkpoints since then if "
        "rank 0 is named, and continue with resume=true"
    }


def test_one_rank_compares_nothing(make_stage: MakeStage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CheckRanks, "check", lambda self: pytest.fail("compared"))
    stage = make_stage("autoencoder")
    stage.images_seen = 8
    for ranks, every in ((Ranks.alone(), 8), (Ranks(0, 2), 0)):
        CheckRanks(stage, every, ranks).on_train_start(None, None)  # type: ignore[arg-type]
        CheckRanks(stage, every, ranks).on_train_batch_end(None, None, None, None, 0)  # type: ignore[arg-type]
