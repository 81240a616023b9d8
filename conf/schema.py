"""Constructor signatures as typed Hydra configs.

Every default is written once, in a constructor. Here each registered part becomes a structured config, so
that a misspelt key, a wrong type or a value out of range fails when the config is composed. The YAML files
beside this module hold differences only.
"""

import dataclasses
import functools
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from data.datamodule import ShardData
from data.rendered import RenderedEdits, RenderedLandscapes
from models.diffusion.distillation import Distillation
from models.registry import REGISTRY, Part, children, construct, options
from models.stages.averages import HalflifeAverage, PowerFunctionAverage
from models.stages.cluster import Here, Slurm
from models.stages.compute import TrainerOptions
from models.stages.evaluations import EvaluationOptions
from models.stages.keep import Keep
from models.stages.logs import CsvLog, TensorboardLog, WandbLog
from models.stages.losses import ReconstructionLoss
from models.stages.muon import Muon
from models.stages.optim import AdamW
from models.stages.plan import Plan

#: Parts of training, which no checkpoint needs to be sampled from.
TRAINING: dict[str, dict[str, Part]] = {
    "optimizer/autoencoder": {"adamw": AdamW, "muon": Muon},
    "optimizer/diffusion": {"adamw": AdamW, "muon": Muon},
    "optimizer/distillation": {"adamw": AdamW, "muon": Muon},
    "plan/autoencoder": {"plan": Plan},
    "plan/diffusion": {"plan": Plan},
    "plan/distillation": {"plan": Plan},
    "ema": {"halflife": HalflifeAverage, "power": PowerFunctionAverage},
    "reconstruction": {"pixels": ReconstructionLoss},
    "distillation": {"path": Distillation},
    "data": {"shards": ShardData},
    "rendered": {"landscapes": RenderedLandscapes, "landscape_edits": RenderedEdits},
    "trainer": {"options": TrainerOptions},
    "keep": {"checkpoints": Keep},
    "evaluation": {"beside": EvaluationOptions},
    "launcher": {"here": Here, "batch": Slurm},
    "logger": {"csv": CsvLog, "wandb": WandbLog, "tensorboard": TensorboardLog},
}


class StageName(Enum):
    """The stages `train.py` can run, in the order in which they run."""

    autoencoder = "autoencoder"
    diffusion = "diffusion"
    distillation = "distillation"


@dataclasses.dataclass
class SamplingConfig:
    """How pictures are made while and after training, and by default from the checkpoint."""

    num_steps: int = 10
    guidance_scale: float = 3.0
    image_guidance_scale: float = 1.5  # of the picture that is edited, where the backbone takes one


@dataclasses.dataclass
class TrainConfig:
    """What `train.py` is told; every group is filled in from the defaults list of `train.yaml`."""

    name: str | None = None
    base: str | None = None  # a run folder or exported file whose networks this run begins with, or learns of
    seed: int = 0
    stages: list[StageName] = dataclasses.field(
        default_factory=lambda: [StageName.autoencoder, StageName.diffusion]
    )
    resume: bool = False
    estimate: bool = False  # what training would need is said, and nothing is trained; plan=true for short
    debug: bool = False
    folder: str = "runs"
    autoencoder: Any = MISSING
    reconstruction: Any = MISSING
    text_encoder: Any = MISSING
    backbone: Any = MISSING
    objective: Any = MISSING
    sampler: Any = MISSING
    grid: Any = MISSING
    guidance: Any = MISSING
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    plan: Any = MISSING
    optimizer: Any = MISSING
    ema: Any = MISSING  # how the diffusion stage averages its weights
    conditioning_dropout: float = 0.1
    distillation: Any = MISSING
    decoder: Any = None  # a small one that a student learns besides; None: the autoencoder's own
    data: Any = MISSING
    rendered: Any = MISSING
    trainer: Any = MISSING
    keep: Any = MISSING
    evaluation: Any = MISSING
    logger: Any = MISSING
    launcher: Any = MISSING


@dataclasses.dataclass
class SampleConfig:
    """What `sample.py` is told; None is as the checkpoint was trained to be sampled, or else nothing."""

    checkpoint: str | None = None
    prompt: Any = None  # a string, or a list of strings
    prompts_file: str | None = None
    negative_prompt: str = ""
    other_prompt: str | None = None  # the pictures of a prompt lead from it to this one
    num_images: int = 4  # of each prompt
    seed: int = 0
    num_steps: int | None = None
    guidance_scale: float | None = None
    guide_checkpoint: str | None = None  # a weaker or earlier one that guides instead of the empty prompt
    size: Any = None  # pixels a side, or [width,height]
    tiled: bool = False
    wrap: bool = False
    full_decoder: bool = False  # the autoencoder's decoder, though a student has a smaller one
    variation: float | None = None
    variation_seed: int | None = None
    image: str | None = None
    strength: float | None = None
    mask: str | None = None
    extend: list[int] = dataclasses.field(default_factory=lambda: [0, 0, 0, 0])
    feather: int | None = None
    repaint: int | None = None
    image_guidance_scale: float | None = None
    sampler: Any = None
    grid: Any = None
    guidance: Any = None
    batch_size: int = 16
    device: str = "auto"
    output: str | None = None  # None: a folder of samples/ for each request
    overwrite: bool = False
    format: str = "png"
    quality: int = 95
    watermark: str = ""
    certificate: str | None = None
    private_key: str | None = None
    algorithm: str = "es256"
    verify: str | None = None
    debug: bool = False


@dataclasses.dataclass
class VarietyConfig:
    """Which pictures tell how varied those of one prompt are."""

    prompts: int = 16  # 0: variety is not measured
    seeds: int = 16  # pictures of each
    class_field: str | None = None  # of the samples' JSON: real pictures of a class are what a prompt's face


@dataclasses.dataclass
class EvaluateConfig:
    """What `scripts/evaluate.py` is told; None is as the checkpoint was trained to be sampled, or a default
    that the help names.
    """

    checkpoint: str | None = None
    out: str | None = None  # None: evaluation/<images>-<request> beside the run
    prompts: str | None = (
        None  # a file of a prompt suite; None: captions of held-out samples of the run's data
    )
    pictures: int = 1_024  # one for each prompt, fewer where there are fewer prompts
    variety: VarietyConfig = dataclasses.field(default_factory=VarietyConfig)
    shards: str | None = None  # where the run's data lie now; None: where its configuration says
    features: str = "judge"
    features_file: str | None = None  # weights of a network that is not our own
    scorer: str = (
        "auto"  # judge, tower, classifier, none, clip:MODEL; auto: the judge for landscapes, else the tower
    )
    scorer_file: str | None = None  # weights of a clip
    judge: str | None = None  # folder of the landscapes judge; None: beside the run, trained where missing
    memorization: bool = True  # looks at all training pictures, once for each run and feature network
    index: str | None = None  # folder of what was seen of them; None: evaluation/index in the run's folder
    seed: int = 0
    num_steps: int | None = None
    guidance_scale: float | None = None
    size: int | None = None  # pixels a side
    sampler: Any = None
    grid: Any = None
    guidance: Any = None
    batch_size: int = 32
    device: str = "auto"
    devices: int = 1  # processes that share the sampling
    nice: int = 0  # how far behind other work on the machine, 0 to 19
    overwrite: bool = False  # replaces another evaluation in the folder
    debug: bool = False


@dataclasses.dataclass
class SweepConfig:
    """What `scripts/sweep.py` is told; a file of conf/sweep/ says most of it."""

    name: str | None = None  # of the study and its folder; None: the sweep's
    folder: str = "runs"
    space: dict[str, Any] = dataclasses.field(default_factory=dict)  # key of train.py: range or choices
    metrics: dict[str, str] = dataclasses.field(default_factory=dict)  # figure of a run: minimize or maximize
    overrides: list[str] = dataclasses.field(default_factory=list)  # of train.py, for all trials
    trials: int = 12
    search: str = "tpe"  # or grid
    seed: int = 0
    prune_after_images: int = 0  # trials that are behind are stopped from then on; 0: never
    keep_one_in: int = 3  # of those that are compared at each pruning
    failures: int = 3  # trials that may fail
    parallel: int = 1
    devices: int = 1  # of each trial
    where: str = "here"  # trials run here, or by slurm
    slurm: list[str] = dataclasses.field(default_factory=list)  # options of sbatch
    debug: bool = False


@functools.cache
def register() -> None:
    """Puts every part into Hydra's config store, under its group and name, once a process."""
    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainConfig)
    store.store(name="sample_schema", node=SampleConfig)
    store.store(name="sweep_schema", node=SweepConfig)
    store.store(name="evaluate_schema", node=EvaluateConfig)
    for group, parts in {**REGISTRY, **TRAINING}.items():
        for name, part in parts.items():
            store.store(group=group, name=name, node=_schema(name, part))


def make(group: str, config: Mapping[str, Any]) -> Any:
    """The part of training that the plain values `config` of `group` describe.

    Raises:
        ConfigError: a value the part refuses.
    """
    values = {key: value for key, value in config.items() if key != "name"}
    return construct(group.replace("/", "."), TRAINING[group][config["name"]], values)


def plain(config: DictConfig) -> dict[str, Any]:
    """`config` as nested dicts and lists of JSON values; enums by their names."""
    container = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    return {str(key): _json(value) for key, value in dict(container).items()}  # type: ignore[arg-type]


def _json(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(item) for item in value]
    if isinstance(value, Enum):
        return value.name
    return str(value) if isinstance(value, Path) else value


def _schema(name: str, part: Part) -> type:
    """A dataclass with the part's options as fields, its children as free slots, and its name."""
    fields: list[tuple[str, Any, Any]] = [("name", str, dataclasses.field(default=name))]
    for option in options(part).values():
        fields.append((option.name, option.annotation, _field(option.default)))
    fields += [(child, Any, dataclasses.field(default=MISSING)) for child in children(part)]
    return dataclasses.make_dataclass(f"{getattr(part, '__name__', name)}", fields)


def _field(default: Any) -> Any:
    if isinstance(default, dict):
        # Its keys are the user's own; those given are added to the default's.
        return dataclasses.field(
            default_factory=lambda: OmegaConf.create(dict(default), flags={"struct": False})
        )
    if dataclasses.is_dataclass(default) or isinstance(default, list):
        return dataclasses.field(default_factory=lambda: default)
    return dataclasses.field(default=default)
