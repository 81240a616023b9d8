"""Editing: what is known stays known to the bit, whole strength is a new picture, one tile is no tile."""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from models.conditioning import Conditioning
from models.diffusion.draws import Draws, Purpose
from models.diffusion.editing import Tiled, cut, inpaint, interpolate, resampled, slerp, start
from models.diffusion.grids import karras_grid, uniform_grid
from models.diffusion.guidance import Branch, guide
from models.diffusion.samplers import Sampler, ancestral, euler, multistep
from models.diffusion.schedules import (
    CosineSchedule,
    EDMSchedule,
    FlowSchedule,
    LinearSchedule,
    Schedule,
    expand,
)
from models.diffusion.solvers import dpmpp_2m, dpmpp_2m_sde, edm_stochastic, heun, unipc

Exact = Callable[[Schedule], Any]
SCHEDULES = [FlowSchedule(), CosineSchedule(), EDMSchedule(), LinearSchedule()]
DETERMINISTIC: list[Sampler] = [euler, multistep, heun, dpmpp_2m, unipc]
STOCHASTIC: list[Sampler] = [ancestral, dpmpp_2m_sde, edm_stochastic]
SHAPE = (2, 3, 8, 8)


def name(value: object) -> str:
    return type(value).__name__


def noise_like(x: Tensor) -> Callable[[int], Tensor]:
    return functools.partial(Draws(9, torch.arange(len(x))).normal, Purpose.STEP_NOISE, x.shape[1:])


@pytest.mark.parametrize("strength", [0.05, 0.3, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("num_steps", [1, 3, 20])
def test_exactly_the_wanted_steps_are_walked(num_steps: int, strength: float) -> None:
    times = cut(uniform_grid, FlowSchedule(), num_steps, strength)
    assert len(times) == num_steps + 1
    assert times[-1] == 0
    assert times[0].item() == pytest.approx(strength, rel=0.5 * strength / num_steps + 1e-6)
    if strength == 1:
        assert torch.equal(times, uniform_grid(FlowSchedule(), num_steps))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
def test_strength_1_is_from_noise_and_less_keeps_the_picture(
    schedule: Schedule, rng: torch.Generator
) -> None:
    x0, other, noise = torch.randn(3, *SHAPE, generator=rng)
    times = cut(karras_grid, schedule, 6, 1.0)
    assert torch.equal(start(schedule, x0, noise, times), start(schedule, other, noise, times))
    assert torch.equal(start(schedule, x0, noise, times), schedule(times[:1]).sigma * noise)
    times = cut(karras_grid, schedule, 6, 0.4)
    alpha, sigma = schedule(times[:1])
    torch.testing.assert_close(start(schedule, x0, noise, times), alpha * x0 + sigma * noise)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
@pytest.mark.parametrize("sampler", [*DETERMINISTIC, *STOCHASTIC])
def test_what_is_known_stays_known_to_the_bit(
    sampler: Sampler, schedule: Schedule, mixture: Exact, rng: torch.Generator
) -> None:
    """Half is painted; with all known the picture comes back, with nothing known sampling is as ever."""
    known, noise = torch.randn(2, 2, 3, 8, 1, generator=rng)
    half = (torch.arange(8) < 4).float().reshape(1, 1, 8, 1).expand(2, 1, 8, 1)
    times = uniform_grid(schedule, 7)
    x = start(schedule, known, noise, times)
    denoise = mixture(schedule)
    plain = sampler(denoise, schedule, x, times, noise_like(x), None)
    for mask in (half, torch.zeros_like(half), torch.ones_like(half)):
        painted = sampler(inpaint(denoise, known, mask), schedule, x, times, noise_like(x), None)
        keep = (mask == 0).expand_as(known)
        assert torch.equal(painted[keep], known[keep])
        assert torch.equal(painted[~keep], plain[~keep])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_what_is_known_has_its_first_noise_at_every_step(
    sampler: Sampler, schedule: Schedule, mixture: Exact, rng: torch.Generator
) -> None:
    known, noise = torch.randn(2, 2, 3, 8, 1, generator=rng)
    times = cut(uniform_grid, schedule, 5, 0.6)
    seen: list[Tensor] = []
    denoise = inpaint(mixture(schedule), known, torch.zeros(2, 1, 8, 1))
    x = start(schedule, known, noise, times)
    sampler(denoise, schedule, x, times, noise_like(x), lambda i, x, x0: seen.append(x))
    for t, x in zip(times[1:], seen, strict=True):
        alpha, sigma = schedule(t[None])
        torch.testing.assert_close(x, alpha * known + sigma * noise, rtol=1e-4, atol=1e-4)


def test_a_soft_mask_blends(gaussian: Exact, rng: torch.Generator) -> None:
    known, noise = torch.randn(2, *SHAPE, generator=rng)
    schedule, times = FlowSchedule(), uniform_grid(FlowSchedule(), 12)
    denoise = gaussian(schedule)
    plain = euler(denoise, schedule, noise, times, noise_like(noise), None)
    distances = []
    for share in (0.0, 0.3, 0.7, 1.0):
        mask = torch.full((2, 1, 8, 8), share)
        soft = euler(inpaint(denoise, known, mask), schedule, noise, times, noise_like(noise), None)
        distances.append((soft - plain).abs().mean().item())
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] == 0


def test_bad_masks_are_refused() -> None:
    known = torch.zeros(SHAPE)
    with pytest.raises(ValueError, match=r"must be \[B 1 h w\]"):
        inpaint(lambda x, t: x, known, torch.zeros(2, 1, 4, 4))
    with pytest.raises(ValueError, match=r"leaves \[0, 1\]"):
        inpaint(lambda x, t: x, known, torch.full((2, 1, 8, 8), 255.0))


def test_resampling_once_is_the_sampler_and_keeps_the_distribution(
    mixture: Exact, rng: torch.Generator
) -> None:
    schedule, x = FlowSchedule(), torch.randn(4_000, 1, generator=rng)
    times = uniform_grid(schedule, 20)
    denoise, noise = mixture(schedule), noise_like(x)
    assert resampled(multistep, 1) is multistep
    seen: list[int] = []
    again = resampled(ancestral, 3)(denoise, schedule, x, times, noise, lambda i, x, x0: seen.append(i))
    assert seen == list(range(1, 21))
    assert (again > 0).float().mean().item() == pytest.approx(0.7, abs=0.04)
    assert again[again > 0].mean().item() == pytest.approx(1.0, abs=0.02)


def test_resampling_never_uses_a_noise_twice(gaussian: Exact) -> None:
    asked: list[int] = []

    def noise(number: int) -> Tensor:
        asked.append(number)
        return torch.zeros(1, 1)

    schedule = FlowSchedule()
    times = uniform_grid(schedule, 4)
    resampled(ancestral, 3)(gaussian(schedule), schedule, torch.ones(1, 1), times, noise, None)
    assert len(asked) == len(set(asked)) == 3 * 3 + 3 * 2


def test_slerp_stays_standard_normal(rng: torch.Generator) -> None:
    a, b = torch.randn(2, 2, 4, 64, 64, generator=rng)
    assert torch.equal(slerp(a, b, 0.0), a)
    assert torch.equal(slerp(a, b, 1.0), b)
    for share in (0.1, 0.5, 0.9):
        middle = slerp(a, b, share)
        assert middle.std().item() == pytest.approx(1.0, abs=0.01)
        assert torch.equal(slerp(a[1:], b[1:], share)[0], middle[1])
        nearer = torch.nn.functional.cosine_similarity(middle.flatten(), a.flatten(), 0).item()
        assert nearer == pytest.approx(math.cos(share * math.pi / 2), abs=0.02)
    torch.testing.assert_close(slerp(a, a, 0.5), a)


def prompt(value: float, valid: int) -> Conditioning:
    mask = (torch.arange(5) < valid).expand(2, 5)
    return Conditioning(torch.full((2, 5, 4), value), mask, torch.full((2, 4), value))


def test_interpolated_prompts() -> None:
    a, b = prompt(1.0, 3), prompt(3.0, 4)
    assert interpolate(a, b, 0.0) is a
    assert interpolate(a, b, 1.0) is b
    middle = interpolate(a, b, 0.25)
    assert torch.equal(middle.tokens, torch.full((2, 5, 4), 1.5))
    assert torch.equal(middle.pooled, torch.full((2, 4), 1.5))
    assert torch.equal(middle.mask, b.mask)


class LocalDenoiser:
    """An `x0_hat` of each position alone, told by the picture it is to edit; keeps the sizes it was given."""

    def __init__(self) -> None:
        self.schedule = FlowSchedule()
        self.windows: list[tuple[int, ...]] = []

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        self.windows.append(tuple(x_t.shape[-2:]))
        told = conditioning.tokens[:, :1, :1, None]
        shown = 0 if conditioning.image is None else conditioning.image
        return torch.tanh(x_t) * told + expand(t, x_t) + shown


@pytest.mark.parametrize("size", [(8, 8), (5, 7)])
def test_one_tile_is_no_tile(size: tuple[int, int], rng: torch.Generator) -> None:
    x, t = torch.randn(2, 3, *size, generator=rng), torch.tensor([0.5, 0.2])
    denoiser = LocalDenoiser()
    for wrap in (False, True):
        tiled = Tiled(denoiser, window=8, stride=4, wrap=wrap)
        assert torch.equal(tiled(x, t, prompt(2.0, 3)), denoiser(x, t, prompt(2.0, 3)))


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize(("height", "width", "stride"), [(8, 24, 4), (13, 21, 5), (30, 9, 8)])
def test_tiles_cover_the_canvas_with_weights_of_sum_1(
    height: int, width: int, stride: int, wrap: bool, rng: torch.Generator
) -> None:
    """A denoiser of each position alone does not notice the windows, also where it is shown a picture."""
    x, t = torch.randn(2, 3, height, width, generator=rng), torch.tensor([0.5, 0.2])
    denoiser = LocalDenoiser()
    tiled = Tiled(denoiser, window=8, stride=stride, wrap=wrap)
    for told in (prompt(2.0, 3), prompt(2.0, 3).with_image(x.flip(0))):
        torch.testing.assert_close(tiled(x, t, told), denoiser(x, t, told))
    assert {size for size in denoiser.windows if size != (height, width)} == {(8, 8)}


def test_a_panorama_has_no_seam(rng: torch.Generator) -> None:
    class Blurring(LocalDenoiser):
        def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
            return x_t.mean((-2, -1), keepdim=True).expand_as(x_t)

    x, t, told = torch.randn(2, 3, 8, 24, generator=rng), torch.tensor([0.5, 0.2]), prompt(2.0, 3)
    ring = Tiled(Blurring(), window=8, stride=4, wrap=True)
    turned = ring(x.roll(4, -1), t, told)
    torch.testing.assert_close(turned, ring(x, t, told).roll(4, -1))
    line = Tiled(Blurring(), window=8, stride=4)
    assert (line(x.roll(4, -1), t, told) - line(x, t, told).roll(4, -1)).abs().max() > 0.01


def test_tiles_go_through_guidance(rng: torch.Generator) -> None:
    x, t = torch.randn(2, 3, 8, 20, generator=rng), torch.tensor([0.5, 0.2])
    denoiser = LocalDenoiser()
    cond, null = prompt(2.0, 3), prompt(1.0, 3)
    branches = [Branch(-2.0, null), Branch(3.0, cond)]
    guided = guide(Tiled(denoiser, 8, 4), branches)(x, t)
    torch.testing.assert_close(guided, guide(denoiser, branches)(x, t))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: cut(uniform_grid, FlowSchedule(), 5, 0.0), "strength is 0.0"),
        (lambda: cut(uniform_grid, FlowSchedule(), 0, 0.5), "num_steps is 0"),
        (lambda: resampled(euler, 0), "repeats is 0"),
        (lambda: slerp(torch.ones(1, 2), torch.ones(1, 2), 1.5), "share is 1.5"),
        (lambda: interpolate(prompt(1.0, 1), prompt(2.0, 1), -0.1), "share is -0.1"),
        (lambda: Tiled(LocalDenoiser(), 8, 9), "stride is 9"),
    ],
)
def test_numbers_out_of_range_are_refused(call: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
