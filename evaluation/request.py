"""What pictures are asked for, in the words of `sample.py`, made into work that a pipeline can do.

A command, a page and whoever else asks give the same values by the same keys, so they get the same refusals,
the same pictures and the same records:

    values = {**DEFAULTS, "num_images": 2, "seed": 7, "sampler": part("sampler", "heun")}
    work = make_work(values, ["a dawn"], Source(pipeline, "runs/landscapes", sha256), Given(), Look())
    images = work.pipeline.generate(work.jobs, work.sampling, work.size)
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.credentials import Signer
from data.fields import BadSample, decode_caption
from data.pictures import Look, as_mask, fit
from evaluation.gallery import Work
from models.canvas import extended
from models.pipeline import Pipeline
from models.registry import ConfigError, build, find, options
from models.sampling import STRENGTH, Job, Sampling

VERSION = "0.1.0"
MAX_PICTURES = 1_000_000
#: Sides of a picture in one piece and of a tiled one, as multiples of the training resolution.
MAX_WHOLE, MAX_TILED = 8, 64
#: Every key that is read here, and what it is where nothing is asked for; None is as the checkpoint was
#: trained to be sampled, or else nothing.
DEFAULTS: Mapping[str, Any] = {
    "negative_prompt": "",
    "other_prompt": None,
    "num_images": 4,
    "seed": 0,
    "num_steps": None,
    "guidance_scale": None,
    "size": None,
    "tiled": False,
    "wrap": False,
    "variation": None,
    "variation_seed": None,
    "strength": None,
    "extend": [0, 0, 0, 0],
    "feather": None,
    "repaint": None,
    "image_guidance_scale": None,
    "sampler": None,
    "grid": None,
    "guidance": None,
}


@dataclass(frozen=True)
class Source:
    """A checkpoint that makes pictures.

    Args:
        pipeline: guided by the weaker one already where there is one.
        name: of its file or folder, as records tell it.
        sha256: of it.
        weaker_sha256: of the checkpoint that guides, if one does.
    """

    pipeline: Pipeline
    name: str
    sha256: str
    weaker_sha256: str | None = None


@dataclass(frozen=True)
class Given:
    """The picture that all start from, and its mask: of the same size, white where it is painted anew."""

    image: Image.Image | None = None
    mask: Image.Image | None = None


@dataclass(frozen=True)
class _Start:
    """What jobs start from: parts of each `Job`, what the records say of it, and the size it fixes."""

    parts: Mapping[str, Tensor]
    record: Mapping[str, Any]
    size: tuple[int, int] | None


def make_work(
    values: Mapping[str, Any],
    prompts: Sequence[str],
    source: Source,
    given: Given,
    look: Look,
    signer: Signer | None = None,
) -> Work:
    """Returns the work that `values` ask for: `num_images` pictures of each prompt.

    Args:
        values: all keys of `DEFAULTS`, others are not looked at.
        prompts: clean texts, at least one.
        source: what makes the pictures.
        given: what they start from.
        look: how their files are written.
        signer: who signs these, if anybody.

    Raises:
        ConfigError: values that cannot be used, do not go together, or would have no effect.
    """
    pipeline = source.pipeline
    sampling = _choose_sampling(values, given, pipeline)
    size = _read_size(values["size"], sampling.tiled, pipeline)
    start = _make_start(values, given, pipeline, size)
    jobs = _make_jobs(values, prompts, start)
    _refuse_idle(values, given, sampling, source)
    size = start.size or size
    weaker = source.weaker_sha256
    common = {
        "version": VERSION,
        "torch": torch.__version__,
        "device": pipeline.device.type,
        "checkpoint": source.name,
        "checkpoint_sha256": source.sha256,
        **({} if weaker is None else {"guide_checkpoint_sha256": weaker}),
        **({"full_decoder": True} if pipeline.full_decoder else {}),
        **_describe(values, sampling, pipeline),
        **start.record,
        "size": list(size),
    }
    pipeline.check(jobs, sampling, size)
    return Work(pipeline, sampling, size, jobs, common, look, signer)


def part(group: str, name: str) -> dict[str, Any]:
    """Returns the values of the sampler, grid or guidance of that name, all options as they are by default.

    Raises:
        ConfigError: there is none.
    """
    defaults = {option.name: option.default for option in options(find(group, name)).values()}
    return {"name": name} | {k: v.name if isinstance(v, Enum) else v for k, v in defaults.items()}


def clean(text: Any, label: str) -> str:
    """A text as training captions are: NFC, no control characters, white space folded."""
    try:
        return decode_caption(text if isinstance(text, bytes) else str(text).encode())
    except (BadSample, UnicodeEncodeError) as error:
        raise ConfigError(f"{label} is not usable text: {error}") from None


def too_long(work: Work) -> str:
    """Returns which prompts are longer than what is read, their ends having no effect; "" for none."""
    texts = dict.fromkeys(text for job in work.jobs for text in job.texts)
    encoder = work.pipeline.text_encoder
    dropped = encoder.tokenizer.dropped(list(texts))
    if not any(dropped):
        return ""
    return (
        f"{sum(map(bool, dropped))} of the prompts are longer than the {encoder.context_length - 2} tokens "
        f"that are read; up to {max(dropped)} tokens at the end have no effect"
    )


def _choose_sampling(values: Mapping[str, Any], given: Given, pipeline: Pipeline) -> Sampling:
    """Returns how to sample: as asked for, else as the checkpoint was trained to be sampled."""
    assert pipeline.defaults is not None
    asked = {f.name: values[f.name] for f in fields(Sampling) if values.get(f.name) is not None}
    for group in ("sampler", "grid", "guidance"):
        if group in asked:
            asked[group] = build(group, asked[group])
    if given.image is not None and given.mask is None and not any(values["extend"]):
        asked.setdefault("strength", 1.0 if pipeline.edits else STRENGTH)
    return replace(pipeline.defaults, **asked)


def _describe(values: Mapping[str, Any], sampling: Sampling, pipeline: Pipeline) -> dict[str, Any]:
    """The settings of `sampling` as JSON values; parts by what was asked for, or by the checkpoint's own."""
    parts = {
        group: values[group] if values[group] is not None else pipeline.described.get(group)
        for group in ("sampler", "grid", "guidance")
    }
    numbers = {f.name: getattr(sampling, f.name) for f in fields(Sampling) if f.name not in (*parts, "seed")}
    return {**parts, **numbers}


def _read_size(size: Any, tiled: bool, pipeline: Pipeline) -> tuple[int, int]:
    """(width, height) in pixels of `size`: a number, [width, height], or nothing for the training size.

    Raises:
        ConfigError: not a size, or one that is too large or that the networks cannot make.
    """
    given = [pipeline.resolution] if size is None else size if isinstance(size, list) else [size]
    if len(given) not in (1, 2) or not all(type(side) is int for side in given):
        raise ConfigError(f"size is {size}, but must be a number of pixels, such as 64, or [width,height]")
    most = pipeline.resolution * (MAX_TILED if tiled else MAX_WHOLE)
    if max(given) > most:
        larger = "" if tiled else f"; with tiled=true up to {pipeline.resolution * MAX_TILED}"
        raise ConfigError(f"size is {size}, but a side of at most {most} pixels is made{larger}")
    pipeline.latent_size((given[0], given[-1]))
    return given[0], given[-1]


def _make_start(values: Mapping[str, Any], given: Given, pipeline: Pipeline, size: tuple[int, int]) -> _Start:
    """The picture that the jobs start from, brought to size, its mask or margins; or nothing.

    Raises:
        ConfigError: options that do not go together.
    """
    if given.image is None:
        for key, idle in (("mask", given.mask is None), ("extend", not any(values["extend"]))):
            if not idle:
                raise ConfigError(f"{key} needs a picture; give image=... as well")
        return _Start({}, {}, None)
    if pipeline.edits and (given.mask is not None or any(values["extend"]) or values["strength"]):
        raise ConfigError(
            "this checkpoint edits by instruction: mask, extend and strength are for others; give image alone"
        )
    image = fit(given.image, *size)
    record = {"image_sha256": _digest(image)}
    if any(values["extend"]):
        image, mask = _make_margins(values, given, image, pipeline)
        size = (image.shape[2], image.shape[1])
        return _Start({"image": image, "mask": mask}, {**record, "extend": values["extend"]}, size)
    if given.mask is not None:
        mask = as_mask(given.mask, *size)
        return _Start({"image": image, "mask": mask}, {**record, "mask_sha256": _digest(mask)}, size)
    return _Start({"before" if pipeline.edits else "image": image}, record, size)


def _make_margins(
    values: Mapping[str, Any], given: Given, image: Tensor, pipeline: Pipeline
) -> tuple[Tensor, Tensor]:
    """The canvas around `image` and the mask of what is painted; raises ConfigError."""
    if given.mask is not None:
        raise ConfigError("give either mask or extend, not both")
    if len(values["extend"]) != 4:
        raise ConfigError("extend is pixels left, top, right, bottom, such as extend=[0,0,64,0]")
    left, top, right, bottom = values["extend"]
    if min(values["extend"]) >= 0:  # else `extended` says which is negative
        _, h, w = image.shape
        _read_size([w + left + right, h + top + bottom], bool(values["tiled"]), pipeline)
    try:
        return extended(image, left, top, right, bottom)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _refuse_idle(values: Mapping[str, Any], given: Given, sampling: Sampling, source: Source) -> None:
    """Raises ConfigError for an option that would have no effect beside the others."""
    masked, edits = given.mask is not None or any(values["extend"]), source.pipeline.edits
    idle = {
        "feather": "there is no mask or extend" if not masked else "",
        "repaint": "there is no mask or extend" if not masked else "",
        "variation_seed": "variation is 0" if sampling.variation == 0 else "",
        "image_guidance_scale": "this checkpoint edits no pictures" if not edits else "",
        "other_prompt": "the first of num_images=1 is the prompt itself" if values["num_images"] == 1 else "",
        "negative_prompt": (
            "guidance_scale is 1" if sampling.guidance_scale == 1 and not edits
            else "guide_checkpoint takes its place" if source.weaker_sha256 is not None else ""
        ),
    }  # fmt: skip
    for key, why in idle.items():
        if values[key] not in (None, "") and why:
            raise ConfigError(f"{key} has no effect here: {why}; leave it out")


def _digest(tensor: Tensor) -> str:
    """The SHA-256, in hex, of a picture's or mask's values."""
    return hashlib.sha256(np.ascontiguousarray(tensor.numpy()).tobytes()).hexdigest()


def _make_jobs(values: Mapping[str, Any], prompts: Sequence[str], start: _Start) -> list[Job]:
    """The jobs of the prompts in order, `num_images` each; with `other_prompt` these lead over to it."""
    negative = clean(values["negative_prompt"], "negative_prompt")
    count = values["num_images"]
    if len(prompts) * count > MAX_PICTURES:
        raise ConfigError(
            f"{len(prompts) * count:,} pictures are asked for, at most {MAX_PICTURES:,} are made"
        )
    other, shares = "", [0.0] * count
    if values["other_prompt"] is not None:
        other = clean(values["other_prompt"], "other_prompt")
        if not other:
            raise ConfigError("other_prompt is empty; give the prompt that the pictures should lead to")
        shares = [k / max(count - 1, 1) for k in range(count)]
    jobs: list[Job] = []
    for number, prompt in enumerate(prompts):
        for share in shares:
            # On the way from one prompt to the other only the prompt changes, so the noise stays.
            index = number if other else len(jobs)
            jobs.append(Job(prompt, index, negative, other, share, **start.parts))
    return jobs
