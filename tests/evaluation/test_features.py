"""Features: a row is its picture's alone, weights are named by their hash, other files are refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from data.landscapes import draw_scene, render
from evaluation.adherence import AdherenceJudge, JudgeError, save_judge
from evaluation.features import FeatureNetwork, judge_features, open_features
from models.registry import ConfigError


def pictures(count: int, side: int = 64) -> Tensor:
    pixels = np.stack([render(draw_scene(3, index), side) for index in range(count)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="module")
def judge() -> AdherenceJudge:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AdherenceJudge(width=4).eval()


def assert_rows_stand_alone(network: FeatureNetwork, images: Tensor) -> None:
    """All together, each alone, any part, on one thread and on two: the same features to the bit."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = network.features(images)
        torch.set_num_threads(2)
        assert torch.equal(network.features(images), whole)
        assert torch.equal(network.features(images.flip(0)).flip(0), whole)
        assert torch.equal(torch.cat([network.features(image[None]) for image in images[-3:]]), whole[-3:])
        assert torch.equal(network.features(images[1:]), whole[1:])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert whole.shape == (len(images), network.dim)
    assert whole.dtype == torch.float32
    assert not whole.requires_grad
    assert len(whole.unique(dim=0)) == len(images)
    assert network.features(images[:0]).shape == (0, network.dim)


@pytest.mark.parametrize("side", [64, 128, 32])
def test_rows_of_the_judge_stand_alone(judge: AdherenceJudge, side: int) -> None:
    assert_rows_stand_alone(judge_features(judge), pictures(67, side))


def test_the_judge_is_read_with_its_hash(judge: AdherenceJudge, tmp_path: Path) -> None:
    save_judge(judge, tmp_path)
    network = open_features("judge", tmp_path)
    assert network.sha256 == json.loads((tmp_path / "judge.json").read_text())["sha256"]
    images = pictures(5)
    assert torch.equal(network.features(images), judge_features(judge).features(images))
    torch.testing.assert_close(network.features(images), judge.embed(images.float() / 127.5 - 1))


def test_what_is_no_picture_or_no_network_is_refused(judge: AdherenceJudge, tmp_path: Path) -> None:
    network = judge_features(judge)
    for wrong in (pictures(2).float(), pictures(2)[:, :1], pictures(2)[0]):
        with pytest.raises(ValueError, match="give uint8"):
            network.features(wrong)
    with pytest.raises(ConfigError, match="no feature network 'jugde' \\(did you mean 'judge'"):
        open_features("jugde", tmp_path)
    with pytest.raises(JudgeError, match="no judge can be read"):
        open_features("judge", tmp_path)
