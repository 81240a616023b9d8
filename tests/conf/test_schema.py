"""Typed configuration: all of it composes and builds, defaults are the constructors', mistakes get a line."""

from collections.abc import Callable
from typing import Any

import hydra
import pytest
import torch
from omegaconf import DictConfig

from conf.cli import FOLDER, _refuse_targets, explain
from conf.schema import TRAINING, make, plain, register
from models.loading import build_networks
from models.registry import REGISTRY, ConfigError, build, children, options
from scripts.sweep import read as read_sweep

#: Whole commands as differences, of train.py and of sweep.py.
WHOLE = ("experiment", "sweep")
EXPERIMENTS = sorted(path.stem for path in (FOLDER / "experiment").glob("*.yaml"))
CHOICES = {
    folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
    for folder in FOLDER.iterdir()
    if folder.is_dir() and folder.name not in WHOLE and any(folder.glob("*.yaml"))
}
GROUPS = {**REGISTRY, **TRAINING}


def compose(*words: str, name: str = "train") -> DictConfig:
    register()
    with hydra.initialize_config_dir(str(FOLDER), version_base="1.3"):
        return hydra.compose(name, overrides=list(words))


def message(*words: str, name: str = "train") -> str:
    """What a person reads who typed a mistake."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 - of Hydra's, OmegaConf's or our kinds
        build_everything(plain(compose(*words, name=name)))
    text = explain(caught.value, name)
    assert "\n" not in text
    return text


def build_everything(values: dict[str, Any]) -> None:
    with torch.device("meta"):
        build_networks(values)
    build("objective", values["objective"])
    build("sampler", values["sampler"])
    build("grid", values["grid"])
    for stage in ("autoencoder", "diffusion"):
        make(f"plan/{stage}", values["plan"][stage])
        make(f"optimizer/{stage}", values["optimizer"][stage])
    for group in ("reconstruction", "data", "rendered", "trainer", "logger", "launcher"):
        make(group, values[group])


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_builds(experiment: str) -> None:
    build_everything(plain(compose(f"experiment={experiment}")))


def test_every_sweep_composes_and_names_keys_of_train() -> None:
    known = plain(compose())
    for path in (FOLDER / "sweep").glob("*.yaml"):
        values = plain(compose(f"sweep={path.stem}", name="sweep"))
        asked = read_sweep(values)
        for key in (*asked.space.described, *(word.partition("=")[0] for word in asked.base)):
            node(known, key.replace(".", "/"))


@pytest.mark.parametrize("turn", range(max(map(len, CHOICES.values()))))
def test_every_option_composes_and_builds(turn: int) -> None:
    words = [f"{group}={names[turn % len(names)]}" for group, names in CHOICES.items()]
    if "text_encoder=vit_b_32" in words:
        words.append("text_encoder.allow_random=true")
    build_everything(plain(compose(*words)))


def test_stable_diffusion_has_its_known_size() -> None:
    values = plain(
        compose("autoencoder=sd", "backbone=sd2", "text_encoder.width=1024", "text_encoder.heads=16")
    )
    with torch.device("meta"):
        autoencoder, _, backbone = build_networks(values)
    assert round(sum(p.numel() for p in autoencoder.parameters()) / 1e6, 2) == 83.65
    assert round(sum(p.numel() for p in backbone.parameters()) / 1e6) == 866


def node(values: dict[str, Any], group: str) -> dict[str, Any]:
    for key in group.split("/"):
        values = values[key]
    return values


@pytest.mark.parametrize("turn", range(max(map(len, GROUPS.values()))))
def test_every_default_is_the_constructors(turn: int) -> None:
    chosen = {group: list(parts)[turn % len(parts)] for group, parts in GROUPS.items()}
    # `objective` only holds its four parts; an experiment would differ from the defaults.
    words = [f"{group}={name}" for group, name in chosen.items() if group != "objective"]
    values = plain(compose(*words, "~experiment"))
    for group, name in chosen.items():
        part = GROUPS[group][name]
        given = {key: parameter.default for key, parameter in options(part).items()}
        wanted = plain(DictConfig({"node": given}, flags={"allow_objects": True}))["node"]
        found = node(values, group)
        assert found == {"name": name, **wanted, **{child: found[child] for child in children(part)}}


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("backbone.chanels=[8]", "there is no key 'backbone.chanels' (did you mean 'backbone.channels'?)"),
        ("plan.diffusion.image=3", "did you mean 'plan.diffusion.images'?"),
        ("sede=1", "there is no key 'sede' (did you mean 'seed'?)"),
        ("backbone=tinny", "there is no backbone=tinny (did you mean 'tiny'?)"),
        ("experiment=landscape", "there is no experiment=landscape (did you mean 'landscapes'?)"),
        ("backbones=tiny", "did you mean 'backbone'?"),
        ("seed=many", "seed: Value 'many'"),
        ("backbone.channels=wide", "backbone.channels"),
        ("backbone.scale_shift=maybe", "backbone.scale_shift: Value 'maybe' is not a valid bool"),
        ("trainer.precision=fp16", "Invalid value 'fp16', expected one of [auto, fp32, bf16, fp8]"),
        ("stages=[autoencodr]", "expected one of [autoencoder, diffusion, distillation]"),
        ("trainer.threads=-1", "trainer: threads is -1"),
        ("plan.diffusion.batch_size=0", "plan.diffusion: batch_size is 0, but must be at least 1"),
        ("reconstruction.kl_weight=nan", "reconstruction: kl_weight is nan"),
        ("rendered.images=0", "rendered: images 0"),
        ("objective.schedule.shift=0", "objective/schedule: shift is 0.0, but must be a positive number"),
        ("objective/parameterization=eps", "parameterization 'eps' cannot be used with FlowSchedule"),
        ("autoencoder.norm_groups=7", "autoencoder: channels"),
        ("text_encoder=vit_b_32", "has no weights"),
    ],
)  # fmt: skip
def test_a_mistake_gets_one_line(word: str, said: str) -> None:
    assert said in message(word)


def test_a_mistake_in_what_sample_is_told() -> None:
    assert "did you mean 'guidance_scale'?" in message("guidanse_scale=3", name="sample")
    assert "sampler=eulr (did you mean 'euler'?)" in message("sampler=eulr", name="sample")


def test_code_is_never_named() -> None:
    with pytest.raises(ConfigError, match="_target_ is not accepted"):
        _refuse_targets(["+backbone._target_=os.system"])
    _refuse_targets(['prompt="a _target_ on a hill"'])
    with pytest.raises(ConfigError, match="there is no key '_target_'"):
        build("sampler", {"name": "euler", "_target_": "os.system"})


CHANGES: list[tuple[str, Callable[[dict[str, Any]], Any], Any]] = [
    ("backbone.channels=[32,64]", lambda v: networks(v)[2].channels, (32, 64)),
    ("backbone.head_dim=16", lambda v: networks(v)[2].head_dim, 16),
    ("backbone.position_size=0", lambda v: networks(v)[2].position, None),
    ("backbone.pooled_conditioning=false", lambda v: networks(v)[2].pooled_embedding, None),
    ("autoencoder.latent_channels=7", lambda v: networks(v)[2].latent_channels, 7),
    ("text_encoder.width=48", lambda v: networks(v)[2].conditioning_dim, 48),
    ("text_encoder.context_length=9", lambda v: networks(v)[1].context_length, 9),
    ("objective.schedule.shift=2.5", lambda v: build("objective", v["objective"]).schedule.shift, 2.5),
    ("objective.times.mean=0.25", lambda v: build("objective", v["objective"]).times.mean, 0.25),
    ("objective.times.std=2", lambda v: build("objective", v["objective"]).times.std, 2.0),
    ("grid=log_snr", lambda v: build("grid", v["grid"]).keywords, {"lowest": -9.0, "highest": 9.0}),
    ("data.flip=true", lambda v: make("data", v["data"]).flip, True),
    ("reconstruction.distance=l1", lambda v: make("reconstruction", v["reconstruction"]).distance.name, "l1"),
    ("optimizer.diffusion.momentum=0.5", lambda v: staged("optimizer", "diffusion", v).momentum, 0.5),
    ("plan.autoencoder.gradient_clip=7", lambda v: staged("plan", "autoencoder", v).gradient_clip, 7.0),
]  # fmt: skip


def networks(values: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return build_networks(values)


def staged(group: str, stage: str, values: dict[str, Any]) -> Any:
    return make(f"{group}/{stage}", values[group][stage])


def test_keys_change_what_is_built() -> None:
    before = plain(compose())
    after = plain(compose(*(word for word, _, _ in CHANGES)))
    for word, read, wanted in CHANGES:
        assert read(before) != wanted, word
        assert read(after) == wanted, word


def test_plain_values_are_json() -> None:
    values = plain(compose("stages=[diffusion]"))
    assert values["stages"] == ["diffusion"]
    assert values["trainer"]["precision"] == "auto"
    assert values["data"]["background"] == [255, 255, 255]
