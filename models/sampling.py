"""What a picture is asked for: `Job` is one picture, `Sampling` what all pictures of a request share.

Both are plain values, checked when they are made, so that a command, the evaluation and a page refuse the
same numbers with the same words. Used by `models.pipeline`.
"""

import functools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.diffusion.editing import cut
from models.diffusion.guidance import Guidance
from models.diffusion.samplers import Grid, Sampler, euler
from models.diffusion.schedules import Schedule
from models.registry import ConfigError
from models.tiny_decoder import TinyDecoder

MAX_STEPS = 10_000
MAX_SCALE = 1_000.0
#: How far a picture goes back to noise where a call does not say.
STRENGTH = 0.6


@dataclass(frozen=True)
class Sampling:
    """How pictures are made from noise.

    Args:
        guidance_scale: 1 = conditional only; any number up to 1,000.
        num_steps: denoiser steps, at least 1.
        sampler: how to integrate.
        grid: the times to visit.
        seed: of the noise.
        guidance: what refines the guidance.
        image_guidance_scale: of the picture that is edited by instruction; 1 = no guidance by it.
        strength: how far a job with an image goes back to noise, above 0; 1 is a new picture.
        variation: share of the noise of `variation_seed`, from 0 to 1: other pictures near the seed's own.
        variation_seed: of that noise.
        repaint: how often each step is walked where a job has a mask; more fits the edges better.
        feather: pixels around a mask in which painted and known blend.
        tiled: pictures larger than the training size are made of windows of that size that overlap.
        wrap: and close to a ring from left to right.

    Raises:
        ConfigError: a number out of range.
    """

    guidance_scale: float
    num_steps: int
    sampler: Sampler
    grid: Grid
    seed: int
    guidance: Guidance = field(default_factory=Guidance)
    image_guidance_scale: float = 1.5
    strength: float = 1.0
    variation: float = 0.0
    variation_seed: int = 1
    repaint: int = 1
    feather: int = 4
    tiled: bool = False
    wrap: bool = False

    def __post_init__(self) -> None:
        for name, scale in (
            ("guidance_scale", self.guidance_scale),
            ("image_guidance_scale", self.image_guidance_scale),
        ):
            if not (math.isfinite(scale) and abs(scale) <= MAX_SCALE):
                raise ConfigError(f"{name} is {scale}, but must be a number up to {MAX_SCALE:g}, such as 3")
        if not 1 <= self.num_steps <= MAX_STEPS:
            raise ConfigError(f"num_steps is {self.num_steps}, but must be from 1 to {MAX_STEPS:,}")
        if not 0 < self.strength <= 1:
            raise ConfigError(f"strength is {self.strength}, but must be above 0 and at most 1 (new picture)")
        if not 0 <= self.variation <= 1:
            raise ConfigError(f"variation is {self.variation}, but must be from 0 (none) to 1 (another seed)")
        if not 1 <= self.repaint <= 100:
            raise ConfigError(f"repaint is {self.repaint}, but must be from 1 to 100")
        if not 0 <= self.feather <= 1_000:
            raise ConfigError(f"feather is {self.feather} pixels, but must be from 0 to 1,000")
        if self.wrap and not self.tiled:
            raise ConfigError("wrap closes a tiled picture to a ring; set tiled=true as well")

    def times(self, schedule: Schedule) -> Tensor:
        """The times `[num_steps + 1]` that are visited; raises ConfigError for a grid that cannot be."""
        if self.num_steps / self.strength > MAX_STEPS:
            raise ConfigError(
                f"strength is {self.strength} with {self.num_steps} steps, which would be the end of a walk "
                f"of more than {MAX_STEPS:,}; give more strength"
            )
        try:
            return cut(self.grid, schedule, self.num_steps, self.strength)
        except ValueError as error:
            raise ConfigError(f"grid: {error}") from None


@dataclass(frozen=True, eq=False)
class Student:
    """What a distilled checkpoint was made for; it can do nothing else.

    Args:
        guidance_scale: of its teacher, built in.
        times: `[N+1]` that it was taught to visit, one step between two of them.
        decoder: a small one of its own, or None.
    """

    guidance_scale: float
    times: Tensor
    decoder: TinyDecoder | None = None

    def check(self, sampling: Sampling, schedule: Schedule) -> None:
        """Raises ConfigError for a `sampling` that the student was not taught."""
        steps = len(self.times) - 1
        if sampling.guidance_scale != 1:
            raise ConfigError(
                f"guidance_scale is {sampling.guidance_scale:g}, but this checkpoint is a student with "
                f"guidance of {self.guidance_scale:g} built in, which is not guided again; leave it out, or "
                "sample its teacher"
            )
        if not is_euler(sampling.sampler):
            raise ConfigError("this checkpoint is a student, whose steps are plain ones; use sampler=euler")
        if not torch.equal(sampling.times(schedule), self.times):
            raise ConfigError(
                f"this checkpoint is a student of {steps} steps from pure noise at times of its own; leave "
                "out num_steps, grid and strength, or sample its teacher"
            )


@dataclass(frozen=True, eq=False)
class Job:
    """One picture.

    Args:
        prompt: what it shows; "" is the unconditional model. With `before`, what is to be changed.
        index: its number: its noise depends on the seed and this alone.
        negative_prompt: what guidance leads away from.
        other_prompt: what the prompt is mixed with, `share` of it from 0 to 1.
        share: see `other_prompt`.
        image: picture to start from, uint8 `[3 H W]`; see `Sampling.strength`.
        mask: float32 `[H W]` from 0 (the image stays, to the bit) to 1 (painted anew); needs `image`.
        before: picture to be edited by instruction, uint8 `[3 H W]`; for a backbone that was trained to.

    Raises:
        ConfigError: a share out of range, or a mask without an image of its size.
    """

    prompt: str
    index: int
    negative_prompt: str = ""
    other_prompt: str = ""
    share: float = 0.0
    image: Tensor | None = field(default=None, repr=False)
    mask: Tensor | None = field(default=None, repr=False)
    before: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ConfigError(f"share is {self.share}, but must be from 0 (prompt) to 1 (other_prompt)")
        if self.mask is not None and (self.image is None or self.mask.shape != self.image.shape[1:]):
            raise ConfigError("mask: there is no image of its size to paint in; give image=... as well")

    @property
    def texts(self) -> tuple[str, ...]:
        """All that the text encoder reads for it."""
        return self.prompt, self.negative_prompt, self.other_prompt

    @property
    def kind(self) -> tuple[object, ...]:
        """What jobs of one batch have in common: which pictures they come with, and of what size."""
        return tuple(None if part is None else part.shape for part in (self.image, self.mask, self.before))


def is_euler(sampler: Sampler) -> bool:
    """Whether `sampler` takes the plain steps that a student is taught."""
    return (sampler.func if isinstance(sampler, functools.partial) else sampler) is euler
