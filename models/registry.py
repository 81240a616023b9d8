"""Which parts there are, by name, and how a part is built from plain values.

A part's constructor is its only specification. Parameters with a default are configuration; parameters whose
type is one of the interfaces below are parts themselves, chosen by name; the rest is given at run time by
whoever builds it (latent channels, text width). A configuration is therefore a mapping of plain values with a
`name`, and the same mapping comes from the command line, from a checkpoint's JSON or from a test. Names are
looked up here and nowhere else, so a file can never name code to run.
"""

import difflib
import functools
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Any

import torch

from models.autoencoder import Autoencoder
from models.diffusion.grids import karras_grid, log_snr_grid, sgm_uniform_grid, uniform_grid, warped_grid
from models.diffusion.guidance import Guidance
from models.diffusion.objective import Objective
from models.diffusion.parameterizations import EDM, Clean, Flow, Noise, Parameterization, Velocity
from models.diffusion.samplers import Grid, Sampler, ancestral, euler, multistep
from models.diffusion.schedules import CosineSchedule, EDMSchedule, FlowSchedule, LinearSchedule, Schedule
from models.diffusion.solvers import dpmpp_2m, dpmpp_2m_sde, edm_stochastic, heun, unipc
from models.diffusion.times import (
    LogitNormalTimes,
    LogNormalSigmaTimes,
    ModeTimes,
    TimeDistribution,
    UniformLogSNRTimes,
    UniformTimes,
)
from models.diffusion.weightings import (
    EDMWeighting,
    MinSNRWeighting,
    SigmoidWeighting,
    UnitWeighting,
    Weighting,
)
from models.text_encoder import OpenClipTextEncoder, TextTransformer
from models.tiny_decoder import TinyDecoder
from models.unet import UNet

Part = Callable[..., Any]

#: group -> name -> class or function.
REGISTRY: dict[str, dict[str, Part]] = {
    "autoencoder": {"kl": Autoencoder},
    "text_encoder": {"transformer": TextTransformer, "open_clip": OpenClipTextEncoder},
    "backbone": {"unet": UNet},
    "decoder": {"tiny": TinyDecoder},
    "objective": {"diffusion": Objective},
    "objective/schedule": {
        "flow": FlowSchedule,
        "cosine": CosineSchedule,
        "edm": EDMSchedule,
        "linear": LinearSchedule,
    },
    "objective/parameterization": {"flow": Flow, "v": Velocity, "eps": Noise, "x0": Clean, "edm": EDM},
    "objective/weighting": {
        "unit": UnitWeighting,
        "min_snr": MinSNRWeighting,
        "edm": EDMWeighting,
        "sigmoid": SigmoidWeighting,
    },
    "objective/times": {
        "logit_normal": LogitNormalTimes,
        "uniform": UniformTimes,
        "mode": ModeTimes,
        "log_normal_sigma": LogNormalSigmaTimes,
        "uniform_log_snr": UniformLogSNRTimes,
    },
    "sampler": {
        "multistep": multistep,
        "euler": euler,
        "ancestral": ancestral,
        "heun": heun,
        "dpmpp_2m": dpmpp_2m,
        "dpmpp_2m_sde": dpmpp_2m_sde,
        "unipc": unipc,
        "edm_stochastic": edm_stochastic,
    },
    "guidance": {"refined": Guidance},
    "grid": {
        "uniform": uniform_grid,
        "log_snr": log_snr_grid,
        "karras": karras_grid,
        "sgm_uniform": sgm_uniform_grid,
        "warped": warped_grid,
    },
}


def _try_sampler(sampler: Sampler) -> None:
    times = torch.tensor([0.8, 0.4, 0.0], device="cpu")
    x = torch.zeros(1, 1, 1, 1, device="cpu")
    sampler(lambda x_t, t: x_t, FlowSchedule(), x, times, lambda number: x, None)


def _try_grid(grid: Grid) -> None:
    grid(FlowSchedule(), 2)


#: Functions find options out of range only when they are called, so `build` calls them once, on nothing.
_TRIALS: dict[str, Callable[[Any], None]] = {"sampler": _try_sampler, "grid": _try_grid}
#: So many known words may be listed in a message.
_FEW = 12
_INTERFACES: tuple[type, ...] = (Schedule, Parameterization, Weighting, TimeDistribution)


class ConfigError(ValueError):
    """A configuration that names an unknown part or key, or gives a value that cannot be used."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the nearest known word; where none is near, the known words if few."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f" (did you mean '{close[0]}'?)"
    return f" (known: {', '.join(known)})" if len(known) <= _FEW else ""


def options(part: Part) -> dict[str, inspect.Parameter]:
    """The configuration of a part: its parameters with a default, annotations resolved to types."""
    return {p.name: p for p in _parameters(part) if p.default is not inspect.Parameter.empty}


def children(part: Part) -> list[str]:
    """Names of the constructor's parameters that are parts themselves; a function has none."""
    if not inspect.isclass(part):
        return []
    return [
        p.name for p in _parameters(part) if isinstance(p.annotation, type) and p.annotation in _INTERFACES
    ]


def find(group: str, name: str) -> Part:
    """The part of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in REGISTRY[group]:
        raise ConfigError(f"{group}: there is no '{name}'{did_you_mean(name, REGISTRY[group])}")
    return REGISTRY[group][name]


def build(group: str, config: Mapping[str, Any], **given: Any) -> Any:
    """The part that `config` describes: an instance, or a function with its options filled in.

    Args:
        group: key of `REGISTRY`.
        config: plain values, with the part's `name`.
        given: what is known only at run time.

    Raises:
        ConfigError: unknown name or key, wrong type, or a value the part refuses.
    """
    part = find(group, str(config.get("name")))
    nested = {
        child: build(f"{group}/{child}", _mapping(group, child, config.get(child)))
        for child in children(part)
    }
    plain = {key: value for key, value in config.items() if key != "name" and key not in nested}
    built = construct(group, part, plain, **nested, **given)
    if group in _TRIALS:
        try:
            _TRIALS[group](built)
        except ValueError as error:
            raise ConfigError(f"{group}: {error}") from None
    return built


def construct(label: str, part: Part, config: Mapping[str, Any], **given: Any) -> Any:
    """`part` called with the plain values of `config`, converted to its annotations, and with `given`.

    Raises:
        ConfigError: as `build`; the message begins with `label`.
    """
    known = options(part)
    values: dict[str, Any] = {}
    for key, value in config.items():
        if key not in known:
            raise ConfigError(f"{label}: there is no key '{key}'{did_you_mean(key, known)}")
        try:
            values[key] = _convert(value, known[key].annotation)
        except (TypeError, ValueError, KeyError):
            wanted = getattr(known[key].annotation, "__name__", str(known[key].annotation))
            raise ConfigError(f"{label}.{key} is {value!r}, but must be of type {wanted}") from None
    if not inspect.isclass(part):
        return functools.partial(part, **values)
    try:
        return part(**values, **given)
    except ValueError as error:
        raise ConfigError(f"{label}: {error}") from None


def _mapping(group: str, child: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{group}.{child} is {value!r}, but must be a mapping with a name")
    return value


def _parameters(part: Part) -> list[inspect.Parameter]:
    signature = inspect.signature(part)
    hints = typing.get_type_hints(part.__init__ if inspect.isclass(part) else part)
    return [p.replace(annotation=hints.get(p.name, Any)) for p in signature.parameters.values()]


def _convert(value: Any, annotation: Any) -> Any:
    """`value`, as JSON or YAML gives it, as the annotated type."""
    arguments = typing.get_args(annotation)
    if type(None) in arguments:
        return None if value is None else _convert(value, next(a for a in arguments if a is not type(None)))
    if typing.get_origin(annotation) is tuple:
        if isinstance(value, str):
            raise TypeError
        return tuple(_convert(item, arguments[0]) for item in value)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return value if isinstance(value, annotation) else annotation[value]
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(annotation, type) and type(value) is not annotation:
        raise TypeError
    return value
