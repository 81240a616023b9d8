"""Guidance: a weighted sum in as few calls as possible, the identities of its corrections, and refusals."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from models.conditioning import Conditioning
from models.diffusion.corrections import OptimalScale, Outputs, Projection, Rescale, Threshold
from models.diffusion.denoiser import Denoiser
from models.diffusion.grids import uniform_grid
from models.diffusion.guidance import Branch, Denoise, Guidance, Interval, guide
from models.diffusion.parameterizations import Flow, Velocity
from models.diffusion.samplers import euler
from models.diffusion.schedules import CosineSchedule, FlowSchedule, Schedule

SHAPE = (3, 4, 5, 5)


def conditioning(value: float, B: int = 3) -> Conditioning:
    return Conditioning(torch.full((B, 3, 4), value), torch.ones(B, 3, dtype=torch.bool), torch.zeros(B, 4))


COND, NULL, OTHER = conditioning(2.0), conditioning(1.0), conditioning(-0.5)


class CountingBackbone:
    """Outputs something unlike for each conditioning, and counts calls and images."""

    def __init__(self, gain: float = 1.0) -> None:
        self.gain = gain
        self.images = 0
        self.calls = 0

    def __call__(self, x: Tensor, c_noise: Tensor, conditioning: Conditioning) -> Tensor:
        self.images += len(x)
        self.calls += 1
        told = conditioning.tokens[:, 0, 0].reshape(-1, 1, 1, 1)
        return self.gain * torch.sin(told * x + 0.3 * told) + 0.1 * told


def setup(schedule: Schedule | None = None, gain: float = 1.0) -> tuple[Denoiser, CountingBackbone]:
    backbone = CountingBackbone(gain)
    return Denoiser(backbone, schedule or FlowSchedule(), Flow()), backbone


def cfg(denoiser: Denoiser, scale: float, guidance: Guidance | None = None, B: int = 3) -> Denoise:
    """Classifier-free guidance of `COND` against `NULL`, perhaps refined, for B pictures."""
    branches = [Branch(1 - scale, conditioning(1.0, B)), Branch(scale, conditioning(2.0, B))]
    return (guidance or Guidance()).combine(denoiser, branches)


@pytest.fixture
def x(rng: torch.Generator) -> Tensor:
    return torch.randn(SHAPE, generator=rng)


T = torch.full((3,), 0.5)


@pytest.mark.parametrize(("scale", "branches"), [(0.0, 1), (1.0, 1), (3.5, 2)])
def test_classifier_free_guidance_is_the_weighted_sum(scale: float, branches: int, x: Tensor) -> None:
    denoiser, backbone = setup()
    guided = cfg(denoiser, scale)(x, T)
    assert (backbone.calls, backbone.images) == (1, branches * 3)
    expected = (1 - scale) * denoiser(x, T, NULL) + scale * denoiser(x, T, COND)
    torch.testing.assert_close(guided, expected)


def test_guidance_weights_must_sum_to_1() -> None:
    denoiser = Denoiser(CountingBackbone(), FlowSchedule(), Velocity())
    with pytest.raises(ValueError, match=r"sum to 1\.5"):
        guide(denoiser, [Branch(0.5, NULL), Branch(1.0, COND)])


def test_three_branches_for_editing(x: Tensor) -> None:
    denoiser, backbone = setup()
    s_i, s_t = 1.5, 6.0
    pictures = [c.with_image(torch.zeros(SHAPE)) for c in (NULL, OTHER, COND)]
    weights = (1 - s_i, s_i - s_t, s_t)
    guided = guide(denoiser, [Branch(w, c) for w, c in zip(weights, pictures, strict=True)])(x, T)
    assert backbone.calls == 1
    null, picture, both = (denoiser(x, T, c) for c in pictures)
    torch.testing.assert_close(guided, null + s_i * (picture - null) + s_t * (both - picture))


def test_a_weaker_denoiser_is_a_branch(x: Tensor) -> None:
    denoiser, backbone = setup()
    weaker, weak_backbone = setup(gain=0.5)
    guided = Guidance().combine(denoiser, [Branch(-1.0, COND, weaker), Branch(2.0, COND)])(x, T)
    assert (backbone.images, weak_backbone.images) == (3, 3)
    torch.testing.assert_close(guided, 2 * denoiser(x, T, COND) - weaker(x, T, COND))


def test_outside_the_interval_only_the_prompt_is_computed(x: Tensor) -> None:
    denoiser, backbone = setup()
    guided = cfg(denoiser, 4.0, Guidance(interval_low=0.2, interval_high=0.6))
    plain = cfg(denoiser, 4.0)
    for t, images in ((0.1, 3), (0.2, 3), (0.21, 6), (0.6, 6), (0.61, 3), (1.0, 3)):
        backbone.images = 0
        got = guided(x, torch.full((3,), t))
        assert backbone.images == images
        wanted = (plain if images == 6 else cfg(denoiser, 1.0))(x, torch.full((3,), t))
        assert torch.equal(got, wanted)
    mixed = torch.tensor([0.1, 0.4, 0.9])
    inside, outside = plain(x, mixed), denoiser(x, mixed, COND)
    torch.testing.assert_close(guided(x, mixed), torch.stack((outside[0], inside[1], outside[2])))


def test_outside_the_interval_it_is_the_prompt_even_at_scale_0(x: Tensor) -> None:
    denoiser, _ = setup()
    guided = cfg(denoiser, 0.0, Guidance(interval_high=0.4))
    assert torch.equal(guided(x, T), denoiser(x, T, COND))
    assert torch.equal(guided(x, T - 0.2), denoiser(x, T - 0.2, NULL))


#: What changes nothing: a whole interval, and each correction at its neutral value.
NEUTRAL = [
    Projection(parallel=1.0, momentum=0.0),
    Projection(1.0, 0.0, norm_limit=1e6),
    Rescale(0.0),
    Threshold(1e6),
]


@pytest.mark.parametrize("correction", NEUTRAL, ids=lambda c: type(c).__name__)
def test_a_neutral_correction_is_plain_guidance(correction: Any, x: Tensor) -> None:
    denoiser, _ = setup()
    branches = [Branch(1 - 4.0, NULL), Branch(4.0, COND)]
    plain = guide(denoiser, branches)(x, T)
    torch.testing.assert_close(guide(denoiser, branches, [correction], Interval(0, 1))(x, T), plain)


REFINED: list[dict[str, Any]] = [
    {"optimal_scale": True}, {"parallel": 0.0}, {"momentum": -0.5}, {"norm_limit": 2.0}, {"rescale": 0.7},
    {"threshold": 1.0}, {"zero_init": 0.6},
]  # fmt: skip
EVERYTHING = {k: v for option in REFINED for k, v in option.items()} | {"interval_low": 0.1, "zero_init": 0.1}


def twice(guidance: Guidance, denoiser: Denoiser, scale: float, x: Tensor) -> Tensor:
    """The second of two steps, where momentum has something to remember."""
    denoise = cfg(denoiser, scale, guidance)
    denoise(x, T + 0.1)
    return denoise(x, T)


@pytest.mark.parametrize("options", REFINED, ids=lambda o: next(iter(o)))
def test_every_refinement_has_an_effect_but_not_at_scale_1(options: dict[str, Any], x: Tensor) -> None:
    denoiser, _ = setup()
    plain = twice(Guidance(), denoiser, 5.0, x)
    assert (twice(Guidance(**options), denoiser, 5.0, x) - plain).abs().max() > 1e-3
    assert torch.equal(twice(Guidance(**options), denoiser, 1.0, x), denoiser(x, T, COND))


def outputs(x: Tensor, schedule: Schedule, branches: list[Tensor], weights: list[float]) -> Outputs:
    return Outputs(x, T, schedule(T), branches, weights)


def test_projection_is_adaptive_projected_guidance(x: Tensor, rng: torch.Generator) -> None:
    cond, uncond, before = torch.randn(3, *SHAPE, generator=rng)
    correct = Projection(parallel=0.3, momentum=-0.5, norm_limit=4.0).start()
    s = 6.0
    for last in (before, uncond):
        given = outputs(x, FlowSchedule(), [last, cond], [1 - s, s])
        found = correct(given, (1 - s) * last + s * cond)
    push = (cond - uncond) - 0.5 * (cond - before)
    for k in range(3):
        mine = push[k] * min(1.0, 4.0 / push[k].norm().item())
        unit = cond[k] / cond[k].norm()
        along = (mine * unit).sum() * unit
        torch.testing.assert_close(found[k], cond[k] + (s - 1) * (mine - along + 0.3 * along))


@pytest.mark.parametrize("schedule", [FlowSchedule(), CosineSchedule()], ids=["flow", "cosine"])
def test_optimal_scale_is_cfg_zero_star(schedule: Schedule, x: Tensor, rng: torch.Generator) -> None:
    """Written in the velocity of the path that the straight one is stretched to."""
    cond, uncond = torch.randn(2, *SHAPE, generator=rng)
    alpha, sigma = (float(c[0]) for c in schedule(T))

    def velocity(x0: Tensor) -> Tensor:
        return (x / (alpha + sigma) - x0) * (alpha + sigma) / sigma

    s = 3.0
    v_c, v_u = velocity(cond), velocity(uncond)
    best = (v_c * v_u).flatten(1).sum(1) / v_u.square().flatten(1).sum(1)
    v = (1 - s) * best[:, None, None, None] * v_u + s * v_c
    wanted = (x - sigma * v) / (alpha + sigma)
    given = outputs(x, schedule, [uncond, cond], [1 - s, s])
    torch.testing.assert_close(OptimalScale().start()(given, (1 - s) * uncond + s * cond), wanted)


def test_optimal_scale_of_equal_branches_changes_nothing(x: Tensor) -> None:
    total = x.flip(0)
    given = outputs(x, FlowSchedule(), [total, total], [-1.0, 2.0])
    torch.testing.assert_close(OptimalScale().start()(given, total), total)
    still = outputs(x, FlowSchedule(), [x, x], [-1.0, 2.0])  # the velocity is 0
    assert torch.equal(OptimalScale().start()(still, x), x)


def test_rescale_restores_the_references_deviation(x: Tensor, rng: torch.Generator) -> None:
    cond, total = torch.randn(SHAPE, generator=rng), 5 * x
    given = outputs(x, FlowSchedule(), [x, cond], [-1.0, 2.0])
    whole = Rescale(1.0).start()(given, total)
    torch.testing.assert_close(whole.flatten(1).std(1), cond.flatten(1).std(1))
    torch.testing.assert_close(Rescale(0.7).start()(given, total), 0.7 * whole + 0.3 * total)


def test_threshold_bounds_only_the_picture_that_exceeds_it(x: Tensor) -> None:
    total = 0.1 * x
    total[1] *= 100
    bounded = Threshold(2.0).start()(outputs(x, FlowSchedule(), [x, x], [-1.0, 2.0]), total)
    assert torch.equal(bounded[[0, 2]], total[[0, 2]])
    assert bounded[1].abs().max().item() == pytest.approx(2.0)
    kept = total[1].abs() < torch.quantile(total[1].abs(), 0.99)
    ratio = bounded[1][kept] / total[1][kept]
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


@pytest.mark.parametrize("schedule", [FlowSchedule(), CosineSchedule()], ids=["flow", "cosine"])
def test_zero_init_stands_still_in_the_first_steps(schedule: Schedule, x: Tensor) -> None:
    denoiser, _ = setup(schedule)
    seen: list[Tensor] = []
    denoise = cfg(denoiser, 3.0, Guidance(zero_init=0.3))
    euler(denoise, schedule, x, uniform_grid(schedule, 5), lambda n: x, lambda i, x, x0: seen.append(x))
    size = [float(sum(c)) for c in zip(*schedule(torch.linspace(1, 0, 6)), strict=True)]
    torch.testing.assert_close(seen[0] / size[1], x)
    torch.testing.assert_close(seen[1] / size[2], x)
    assert (seen[2] / size[3] - x).abs().max() > 0.1


def test_every_run_begins_anew(x: Tensor) -> None:
    denoiser, _ = setup()
    guidance = Guidance(**EVERYTHING)
    assert torch.equal(twice(guidance, denoiser, 5.0, x), twice(guidance, denoiser, 5.0, x))


def test_a_picture_does_not_depend_on_its_batch(x: Tensor) -> None:
    """All refinements at once, whose norms, deviations and quantiles are each picture's own."""
    guidance = Guidance(**EVERYTHING)
    denoiser, _ = setup()
    together = twice(guidance, denoiser, 5.0, x)
    for k in range(3):
        denoise = cfg(denoiser, 5.0, guidance, B=1)
        denoise(x[k : k + 1], T[:1] + 0.1)
        assert torch.equal(denoise(x[k : k + 1], T[:1])[0], together[k])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"interval_low": 0.5, "interval_high": 0.5}, "guidance interval is 0.5 to 0.5"),
        ({"interval_high": 1.2}, "guidance interval is 0.0 to 1.2"),
        ({"parallel": 1.5}, "parallel is 1.5"),
        ({"momentum": -1.0}, "momentum is -1.0"),
        ({"norm_limit": 0.0}, "norm_limit is 0.0"),
        ({"rescale": 1.1}, "share is 1.1"),
        ({"threshold": math.nan}, "limit is nan"),
        ({"zero_init": 1.0}, "share is 1.0"),
        ({"zero_init": 0.1, "interval_high": 0.8}, "has no effect"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Guidance(**options)
