"""Power-function averages: widths, closed forms against integration, and others made of snapshots."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from data.batch import Batch
from models.checkpoint import CheckpointError, save_checkpoint
from models.stages.averages import PowerFunctionAverage, Profile, combination, gamma_of
from models.stages.ema import Ema
from models.stages.snapshots import reconstruct, snapshot_name


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94), (0.25, 0.72)])
def test_exponents_are_those_of_the_widths(sigma_rel: float, gamma: float) -> None:
    found = gamma_of(sigma_rel)
    assert (found + 1) ** 0.5 / ((found + 2) * (found + 3) ** 0.5) == pytest.approx(sigma_rel, rel=1e-9)
    assert found == pytest.approx(gamma, abs=0.05)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.29, float("nan")])
def test_a_width_that_no_average_has_is_refused(sigma_rel: float) -> None:
    with pytest.raises(ValueError, match="must lie in"):
        gamma_of(sigma_rel)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((1000, 17.0), (1000, 6.9)),
        ((400, 17.0), (1000, 6.9)),
        ((1000, 17.0), (400, 6.9)),
        ((7, 0.0), (9, 2.5)),
    ],
)
def test_products_of_profiles_are_their_integrals(
    one: tuple[float, float], other: tuple[float, float]
) -> None:
    end = min(one[0], other[0])
    tau = (np.arange(200_000) + 0.5) * end / 200_000
    values = [(g + 1) / t * (tau / t) ** g for t, g in (one, other)]
    numeric = (values[0] * values[1]).sum() * end / 200_000
    assert Profile(*one).product(Profile(*other)) == pytest.approx(numeric, rel=1e-6)


def test_an_average_follows_its_profile() -> None:
    """Fed one marked step after another, it weighs each by the integral of the profile over that step."""
    averaging, batch, total = PowerFunctionAverage((0.05, 0.10)), 8, 800
    for i, gamma in enumerate(averaging.gammas):
        for marked in (8, 400, 800):
            value = 0.0
            for seen in range(batch, total + 1, batch):
                value += averaging.towards(seen, batch, 1)[i] * (float(seen == marked) - value)
            wanted = (marked / total) ** (gamma + 1) - ((marked - batch) / total) ** (gamma + 1)
            assert value == pytest.approx(wanted, rel=1e-9, abs=1e-15)


def walk(folder: Path, wanted: list[float], dtype: torch.dtype) -> dict[float, torch.Tensor]:
    """Averages of a noisy path of weights, tracked directly; snapshots of 0.05 and 0.10 go to `folder`."""
    rng = torch.Generator().manual_seed(0)
    network = nn.ModuleDict({"a": nn.Linear(32, 32, bias=False)})
    snapped = Ema(network, 1, PowerFunctionAverage((0.05, 0.10)))
    direct = Ema(network, 1, PowerFunctionAverage(tuple(wanted)))
    drift = torch.randn(32, 32, generator=rng)
    for seen in range(16, 6401, 16):
        noise = torch.randn(32, 32, generator=rng)
        network["a"].weight.data = drift * (seen / 6400) ** 0.5 + 0.1 * noise
        for each in (snapped, direct):
            each.update(network, seen, 16)
        if seen % 400 == 0:
            tensors = {
                snapshot_name(width): {k: v.to(dtype) for k, v in average.state_dict().items()}
                for width, average in zip((0.05, 0.10), snapped.networks, strict=True)
            }
            save_checkpoint(folder, seen, tensors, {"averages": {"sigma_rel": [0.05, 0.10]}}, None)
    return {w: n["a"].weight for w, n in zip(wanted, direct.networks, strict=True)}


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2e-3), (torch.float16, 4e-3)])
def test_another_width_is_made_of_snapshots(tmp_path: Path, dtype: torch.dtype, most: float) -> None:
    wanted = walk(tmp_path, [0.07, 0.13, 0.20], dtype)
    for sigma_rel, directly in wanted.items():
        made = reconstruct(tmp_path, sigma_rel)["a.weight"]
        error = (made - directly).norm() / directly.norm()
        nearest = reconstruct(tmp_path, 0.10)["a.weight"]
        assert error < most * (5 if sigma_rel < 0.05 else 1)
        assert error < 0.3 * (nearest - directly).norm() / directly.norm()


def test_a_width_that_was_snapped_is_itself(tmp_path: Path) -> None:
    directly = walk(tmp_path, [0.05], torch.float32)[0.05]
    torch.testing.assert_close(reconstruct(tmp_path, 0.05)["a.weight"], directly, rtol=0, atol=1e-6)


def test_factors_of_snapshots_add_up_to_one() -> None:
    snapshots = [Profile(400.0 * i, gamma_of(w)) for i in range(1, 17) for w in (0.05, 0.10)]
    assert sum(combination(snapshots, Profile(6400, gamma_of(0.13)))) == pytest.approx(1, abs=1e-9)


def test_without_snapshots_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="train with ema=power"):
        reconstruct(tmp_path, 0.1)


def test_recomputed_blocks_give_the_same_gradients(
    make_stage: Callable[..., Any], make_batch: Callable[..., Batch]
) -> None:
    """Every bit, in float32; and less is kept for the backward pass."""
    kept, gradients = [], []
    for recompute in (False, True):
        stage = make_stage("diffusion")
        with torch.no_grad():
            for i, parameter in enumerate(stage.networks.parameters()):
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
                parameter.add_(noise, alpha=0.05)
        stage.use(type(stage.compute)(torch.device("cpu"), False, False, False, "", False, recompute))
        sizes: dict[int, int] = {}

        def keep(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = stage.mean_loss(make_batch(4))
        loss.backward()
        kept.append(sum(sizes.values()))
        gradients.append([p.grad for p in stage.networks.parameters() if p.grad is not None])
    assert kept[1] < 0.8 * kept[0]
    assert len(gradients[0]) == len(gradients[1])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
