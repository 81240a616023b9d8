"""Parts from plain values: JSON round trip, nesting, what is known at run time, and clear refusals."""

import json
from typing import Any

import pytest
import torch

from models.autoencoder import Autoencoder
from models.diffusion.guidance import Guidance
from models.diffusion.objective import Objective
from models.diffusion.schedules import CosineSchedule
from models.diffusion.weightings import MinSNRWeighting
from models.registry import REGISTRY, ConfigError, build, children, construct, did_you_mean, options
from models.stages.compute import Precision, TrainerOptions
from models.stages.logs import WandbLog
from models.text_encoder import OpenClipTextEncoder
from models.unet import UNet

OBJECTIVE: dict[str, Any] = {
    "name": "diffusion",
    "schedule": {"name": "cosine"},
    "parameterization": {"name": "v"},
    "weighting": {"name": "min_snr", "gamma": 3},
    "times": {"name": "uniform"},
}


def test_json_comes_back_as_typed_values() -> None:
    values = json.loads(json.dumps({"precision": "bf16", "threads": 3}))
    assert construct("trainer", TrainerOptions, values).precision is Precision.bf16
    tags = construct("logger", WandbLog, json.loads('{"tags": ["a", "b"], "group": null}'))
    assert (tags.tags, tags.group) == (("a", "b"), None)
    config = {"name": "kl", "channels": [8, 16], "norm_groups": 4, "mid_attention": False}
    autoencoder = build("autoencoder", json.loads(json.dumps(config)))
    assert isinstance(autoencoder, Autoencoder)
    assert autoencoder.channels == (8, 16)
    assert autoencoder.factor == 2


def test_parts_in_parts() -> None:
    objective = build("objective", OBJECTIVE)
    assert isinstance(objective, Objective)
    assert isinstance(objective.schedule, CosineSchedule)
    assert isinstance(objective.weighting, MinSNRWeighting)
    assert objective.weighting.gamma == 3.0
    assert type(objective.weighting.gamma) is float
    assert children(Objective) == ["schedule", "parameterization", "weighting", "times"]


def test_a_function_keeps_its_options() -> None:
    grid = build("grid", {"name": "log_snr", "lowest": -5})
    narrow, wide = grid(CosineSchedule(), 6), build("grid", {"name": "log_snr"})(CosineSchedule(), 6)
    assert (narrow[0], narrow[-1], len(narrow)) == (1, 0, 7)
    assert not torch.allclose(narrow, wide)


@pytest.mark.parametrize(
    ("group", "config", "said"),
    [
        ("sampler", {"name": "ancestral", "eta": 2}, "sampler: eta is 2.0, but must be from 0"),
        ("sampler", {"name": "edm_stochastic", "churn": -1}, "sampler: churn -1.0"),
        ("sampler", {"name": "euler", "eta": 0.5}, "sampler: there is no key 'eta'"),
        ("grid", {"name": "karras", "rho": 0}, "grid: sigma_min 0.002, sigma_max 80.0, rho 0.0: all must be"),
        ("grid", {"name": "warped", "a": -1}, "grid: a and b are -1.0 and 1.4, but must be positive"),
    ],
)  # fmt: skip
def test_options_of_functions_are_tried_at_once(group: str, config: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(group, config)
    assert said in str(caught.value)


@pytest.mark.parametrize(("group", "name"), [(g, n) for g in ("sampler", "grid") for n in REGISTRY[g]])
def test_every_function_is_built_with_its_defaults(group: str, name: str) -> None:
    given = {key: option.default for key, option in options(REGISTRY[group][name]).items()}
    assert build(group, {"name": name, **given}).keywords == given


def test_guidance_from_plain_values() -> None:
    values = json.loads(
        json.dumps({"rescale": 0.7, "norm_limit": None, "threshold": 4, "optimal_scale": True})
    )
    guidance = construct("guidance", Guidance, values)
    assert [type(c).__name__ for c in guidance.corrections] == ["OptimalScale", "Rescale", "Threshold"]
    with pytest.raises(ConfigError, match=r"guidance: momentum is 1\.0, but must be between"):
        construct("guidance", Guidance, {"momentum": 1})


def test_what_is_known_at_run_time_is_no_option() -> None:
    assert {"latent_channels", "conditioning_dim"}.isdisjoint(options(UNet))
    with pytest.raises(ConfigError, match="backbone: there is no key 'latent_channels'"):
        build("backbone", {"name": "unet", "latent_channels": 4}, conditioning_dim=8)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "difusion"}, "objective: there is no 'difusion' (did you mean 'diffusion'?)"),
        ({"schedule": {"name": "cosin"}}, "there is no 'cosin' (did you mean 'cosine'?)"),
        ({"weighting": {"name": "min_snr", "gama": 3}}, "no key 'gama' (did you mean 'gamma'?)"),
        ({"weighting": {"name": "min_snr", "gamma": "x"}}, "gamma is 'x', but must be of type float"),
        ({"weighting": {"name": "min_snr", "gamma": True}}, "gamma is True, but must be of type float"),
        ({"weighting": {"name": "min_snr", "gamma": -1}}, "gamma is -1.0, but must be positive"),
        ({"parameterization": {"name": "eps"}}, "parameterization 'eps' cannot be used with CosineSchedule"),
        ({"schedule": "cosine"}, "objective.schedule is 'cosine', but must be a mapping with a name"),
        ({"schedule": {"name": "os.system"}}, "there is no 'os.system' (known: cosine, edm, flow, linear)"),
    ],
)  # fmt: skip
def test_a_mistake_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build("objective", OBJECTIVE | change)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [{"channels": 8}, {"channels": "88"}, {"channels": [8.5]}, {"latent_channels": 4.0}, {"name": 3}],
)
def test_wrong_types_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        build("autoencoder", {"name": "kl"} | values)


def test_every_part_has_typed_options() -> None:
    for parts in REGISTRY.values():
        for part in parts.values():
            assert all(option.annotation is not Any for option in options(part).values())
    assert options(OpenClipTextEncoder)["pretrained"].default is None


def test_suggestions() -> None:
    assert did_you_mean("fow", ["flow", "cosine"]) == " (did you mean 'flow'?)"
    assert did_you_mean("zzz", ["flow", "cosine"]) == " (known: cosine, flow)"
    assert did_you_mean("zzz", [str(n) for n in range(40)]) == ""
