"""Editing pictures that exist: start from one, keep part of one, mix noises and prompts, and larger canvases.

Everything here wraps what samplers call or prepares what they start from, so it works with every sampler,
schedule and network:

    from a picture    times = cut(grid, schedule, num_steps, strength); x = start(schedule, x0, noise, times)
    inpainting        the same, and sampler(inpaint(denoise, x0, mask), ...)
    seed variation    noise = slerp(noise, other_noise, strength)
    panorama          guide(Tiled(denoiser, window, stride, wrap=True), ...)
"""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from models.conditioning import Conditioning
from models.diffusion.guidance import ConditionalDenoiser, Denoise
from models.diffusion.samplers import Callback, Grid, Sampler, StepNoise, points
from models.diffusion.schedules import Schedule


def cut(grid: Grid, schedule: Schedule, num_steps: int, strength: float) -> Tensor:
    """The last `num_steps` steps of a grid that begins about `strength` of the way to noise: times `[N+1]`.

    The grid is laid out for `num_steps / strength` steps, so that the steps taken are as dense as a whole
    walk's, and exactly `num_steps` of them are taken whatever the strength.

    Args:
        grid: to be cut.
        schedule: of the grid.
        num_steps: N, at least 1.
        strength: in (0, 1]; 1 is the whole grid, less keeps more of the picture.

    Raises:
        ValueError: a number out of range.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength is {strength}, but must be above 0 and at most 1 (a new picture)")
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}, but must be at least 1")
    if strength == 1:
        return grid(schedule, num_steps)
    # One step more at least: the first time of a grid is pure noise, where nothing of the picture is left.
    return grid(schedule, max(round(num_steps / strength), num_steps + 1))[-num_steps - 1 :]


def start(schedule: Schedule, x0: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """What a sampler starts from to change `x0`: the picture with noise at `times[0]`, `[B C h w]`.

    At `t = 1` it is the noise alone, so that a walk of strength 1 does not depend on the picture. (EDM and
    Stable Diffusion's schedules leave a trace of it there, with a weight of 1/80 and 1/15.)
    """
    alpha, sigma = points(schedule, times[:1])[0]
    return sigma * noise if times[0] == 1 else alpha * x0 + sigma * noise


def inpaint(denoise: Denoise, known: Tensor, mask: Tensor) -> Denoise:
    """A `(x_t, t) -> x0_hat` that is `known` wherever the mask is 0.

    A sampler's step from `alpha_t known + sigma_t noise` with `D = known` is `alpha_s known + sigma_s noise`.
    So what is known is at every step the known latents with the noise that the walk began with, for every
    sampler and without touching its state; stochastic samplers renew the noise as they do elsewhere. What is
    painted sees it there at every step.

    Args:
        denoise: of the whole picture.
        known: clean latents `[B C h w]`; the sampler's `x` should be `start(schedule, known, noise, times)`.
        mask: `[B 1 h w]` from 0 (keep) to 1 (paint); values in between blend.

    Raises:
        ValueError: mask and latents do not fit, or the mask leaves [0, 1].
    """
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[-2:] != known.shape[-2:]:
        raise ValueError(
            f"the mask is {tuple(mask.shape)}, but must be [B 1 h w] of the latents {tuple(known.shape)}; "
            "scale it to the latents' height and width"
        )
    if not bool(((mask >= 0) & (mask <= 1)).all()):
        raise ValueError(
            "the mask leaves [0, 1], but must be 0 (keep) to 1 (paint); divide it by its maximum"
        )

    def painted(x_t: Tensor, t: Tensor) -> Tensor:
        x0 = denoise(x_t, t)
        return mask * x0 + (1 - mask) * known

    return painted


def resampled(sampler: Sampler, repeats: int = 10) -> Sampler:
    """A sampler that walks every step `repeats` times, with the noise of the step put back in between.

    RePaint (Lugmayr et al. 2022, arXiv 2201.09865) with jumps of one step: it lets what is painted fit
    what is known better, at `repeats` times the cost. `sampler` walks each step alone, so that a multistep
    sampler is of first order here, and one that shares its churn over a walk spends it all in each step. The
    last step, to clean data, is walked once; `repeats` 1 is the sampler as it is.

    Raises:
        ValueError: `repeats` is below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}, but must be at least 1; 1 is the sampler as it is")
    if repeats == 1:
        return sampler

    def sample(
        denoise: Denoise,
        schedule: Schedule,
        x: Tensor,
        times: Tensor,
        step_noise: StepNoise,
        callback: Callback | None,
    ) -> Tensor:
        at = points(schedule, times)
        x0 = x

        def note(i: int, x: Tensor, clean: Tensor) -> None:
            nonlocal x0
            x0 = clean

        number = 0
        for i in range(len(times) - 1):
            again = repeats if at[i + 1].sigma > 0 else 1
            for turn in range(again):
                x = sampler(denoise, schedule, x, times[i : i + 2], _from(step_noise, number), note)
                if turn < again - 1:
                    ratio = at[i].alpha / at[i + 1].alpha
                    fresh = (at[i].sigma ** 2 - (ratio * at[i + 1].sigma) ** 2).clamp(min=0).sqrt()
                    x = ratio * x + fresh * step_noise(number + 1).to(x)
                number += 2
            if callback is not None:
                callback(i + 1, x, x0)
        return x

    return sample


def _from(step_noise: StepNoise, first: int) -> StepNoise:
    return lambda number: step_noise(first + number)


def slerp(noise: Tensor, other: Tensor, share: float) -> Tensor:
    """Standard normal noise `[B C h w]` on the arc from `noise` (share 0) to `other` (share 1).

    Each picture on its own. A straight mixture would be less noisy than noise, which samplers turn into
    blurred pictures (Shoemake 1985, doi.org/10.1145/325165.325242). With a small share it is a variation of a
    seed.

    Raises:
        ValueError: `share` is outside [0, 1].
    """
    _check_share(share)
    return torch.stack([_slerp(a, b, share) for a, b in zip(noise, other, strict=True)])


def _slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    if share in (0, 1):
        return b if share else a
    lengths = a.double().norm() * b.double().norm()
    angle = math.acos(min(max(float((a.double() * b.double()).sum() / lengths), -1.0), 1.0))
    if math.sin(angle) < 1e-6:  # the same direction, or opposite ones, between which there is no one arc
        return (1 - share) * a + share * b
    return math.sin((1 - share) * angle) / math.sin(angle) * a + math.sin(share * angle) / math.sin(angle) * b


def interpolate(conditioning: Conditioning, other: Conditioning, share: float) -> Conditioning:
    """What lies between two prompts: states and pooled vectors mixed linearly, `share` of the other.

    Shares 0 and 1 are the two themselves; in between, a token is valid where it is in either.

    Raises:
        ValueError: `share` is outside [0, 1].
    """
    _check_share(share)
    if share in (0, 1):
        return other if share else conditioning
    return dataclasses.replace(
        conditioning,
        tokens=torch.lerp(conditioning.tokens, other.tokens, share),
        mask=conditioning.mask | other.mask,
        pooled=torch.lerp(conditioning.pooled, other.pooled, share),
    )


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}, but must be from 0 (the first) to 1 (the other)")


class Tiled:
    """A denoiser of canvases larger than it was trained for: windows that overlap, averaged.

    MultiDiffusion (Bar-Tal et al. 2023, arXiv 2302.08113), with weights that fall smoothly to a
    window's edges. It wraps the denoiser inside guidance, so that corrections measure whole canvases.

    Args:
        denoiser: called once for each window.
        window: latent positions a side that it was trained at.
        stride: from one window to the next, from 1 to `window`; half a window is good.
        wrap: the canvas closes to a ring from left to right, for panoramas.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(self, denoiser: ConditionalDenoiser, window: int, stride: int, wrap: bool = False) -> None:
        if not 1 <= stride <= window:
            raise ValueError(
                f"stride is {stride}, but must be from 1 to the window's {window} latent positions, or there "
                "would be gaps; half the window is good"
            )
        self.denoiser = denoiser
        self.window = window
        self.stride = stride
        self.wrap = wrap

    @property
    def schedule(self) -> Schedule:
        """The wrapped denoiser's."""
        return self.denoiser.schedule

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """`x0_hat`, float32 `[B C h w]`, for canvases of any height and width."""
        h, w = x_t.shape[-2:]
        rows = self._places(h, wrap=False)
        columns = self._places(w, wrap=self.wrap and w > self.window)
        if len(rows) == len(columns) == 1:
            return self.denoiser(x_t, t, conditioning)
        total = torch.zeros_like(x_t, dtype=torch.float32)
        weight = torch.zeros(1, 1, h, w, device=x_t.device)
        for row in rows:
            for column in columns:
                place = (..., row.to(x_t.device)[:, None], column.to(x_t.device)[None, :])
                bump = (_bump(len(row))[:, None] * _bump(len(column))[None, :]).to(x_t.device)
                total[place] += bump * self.denoiser(x_t[place], t, _window(conditioning, place))
                weight[place] += bump
        return total / weight

    def _places(self, size: int, wrap: bool) -> list[Tensor]:
        """Positions along one axis of each window; the last ends at the canvas' end."""
        window = min(self.window, size)
        if wrap:
            starts = list(range(0, size, self.stride))
        else:
            starts = [*range(0, size - window, self.stride), size - window]
        return [torch.arange(first, first + window) % size for first in starts]


def _window(conditioning: Conditioning, place: tuple[Any, ...]) -> Conditioning:
    image = conditioning.image
    return conditioning if image is None else conditioning.with_image(image[place])


def _bump(size: int) -> Tensor:
    """Weights `[size]` along a window: positive, largest in its middle."""
    return torch.sin(math.pi * (torch.arange(size) + 0.5) / size) ** 2
