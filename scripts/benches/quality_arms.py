"""The arms of `bench.py quality`: what each is composed of, and how it learns from batches.

An arm is what `train.py` would compose from a few overrides, and a learner built of it. All learn on the
latents of one finished autoencoder and leave their averaged weights in the form of an exported model, so that
one evaluation serves them all.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from conf.cli import composed
from conf.schema import make
from data.batch import Batch
from models.checkpoint import CheckpointError, newest
from models.loading import build_networks, load_part
from models.stages.compute import Compute
from models.stages.plan import Plan
from scripts.benches.recipe import Recipe


class Learner(Protocol):
    """What a training is made of."""

    @property
    def images_seen(self) -> int:
        """Training images so far."""

    def step(self, batch: Batch) -> float:
        """Makes one training step and returns its loss."""

    def averaged(self) -> dict[str, Tensor]:
        """The averaged weights of text encoder and backbone, named as in an exported model."""


@dataclass(frozen=True)
class Setting:
    """What a learner is built of: the composed `values`, the frozen autoencoder's weights, and the rest.

    `lr` is a factor on the arm's own learning rate, `images` the horizon of a schedule that has one.
    """

    values: dict[str, Any]
    autoencoder: Mapping[str, Tensor]
    lr: float
    seed: int
    images: int
    compute: Compute


@dataclass(frozen=True)
class Arm:
    """One way of training.

    Args:
        name: what tables, folders and JSON call it.
        overrides: of what `train.py` composes by default.
        learner: builds it.
        by_images: whether its schedules need the horizon in images, known before; else it can stop any time.
        rival: whether it computes in the fastest way that is found; else as `train.py` does.
    """

    name: str
    overrides: tuple[str, ...]
    learner: Callable[[Setting], Learner]
    by_images: bool
    rival: bool

    def values(self, demo: Mapping[str, Any]) -> dict[str, Any]:
        """The composed configuration, with the autoencoder and the resolution of the configuration `demo`."""
        values = composed("train", "experiment=landscapes", *self.overrides)
        values["autoencoder"] = demo["autoencoder"]
        values["data"]["resolution"] = demo["resolution"]
        return values


def finished_autoencoder(run: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The averaged weights of the autoencoder of the run in folder `run`, and that run's configuration.

    Raises:
        CheckpointError: there is none.
    """
    checkpoint = newest(run / "autoencoder" / "checkpoints")
    if checkpoint is None:
        raise CheckpointError(
            f"{run}: has no verified autoencoder, whose latents both arms learn; make one with: make demo"
        )
    return checkpoint.tensors("ema"), checkpoint.document("config")


class Ours:
    """What `train.py` does in a step of the diffusion stage, without Lightning around it.

    `bench.py overhead` proves that the same steps through Lightning come to the same weights, and what it
    costs. The plan of the configuration is brought to the horizon as a whole: warm-up, cooldown and the
    halflife of the average keep their shares of it.
    """

    def __init__(self, setting: Setting) -> None:
        # Imported here because lightning takes seconds, which the other arms need not wait for.
        from scripts.benches.overhead import Bare, make_stage

        values = copy.deepcopy(setting.values)
        values["optimizer"]["diffusion"]["lr"] *= setting.lr
        plan = scaled(make("plan/diffusion", values["plan"]["diffusion"]), setting.images)
        self.stage = make_stage(values, plan, setting.seed)
        self.stage.use(setting.compute)
        self.stage.load_autoencoder(dict(setting.autoencoder), "the autoencoder")
        self.loop = Bare(self.stage)

    @property
    def images_seen(self) -> int:
        """Training images so far."""
        return self.stage.images_seen

    def step(self, batch: Batch) -> float:
        """Makes one training step and returns its loss."""
        return self.loop.step(batch).item()

    def averaged(self) -> dict[str, Tensor]:
        """The averaged weights of text encoder and backbone, by the names of the stage."""
        return dict(self.stage.ema.network.state_dict())


def scaled(plan: Plan, images: int) -> Plan:
    """`plan` for the horizon `images`; warm-up and the average's halflife keep their shares of it."""
    share = images / plan.images
    return Plan(
        images,
        plan.batch_size,
        round(plan.warmup_images * share),
        plan.cooldown_fraction,
        max(1, round(plan.ema_halflife_images * share)),
        plan.gradient_clip,
    )


#: The learning rate that the recipe's are factors of, the best of half, once and twice 1e-3 in two earlier
#: measurements; the recipe's own 1e-4 is for weights that are there.
RECIPE_LR = 2e-3


def recipe(setting: Setting) -> Recipe:
    """The recipe's loop, with a fresh text encoder and UNet."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setting.seed)
        autoencoder, text_encoder, _ = build_networks(setting.values)
    load_part(autoencoder, "autoencoder", setting.autoencoder, "the autoencoder")
    return Recipe(
        setting.values["backbone"], autoencoder, text_encoder, RECIPE_LR * setting.lr, setting.seed,
        setting.compute,
    )  # fmt: skip


#: The UNet of the recipe: as wide and deep as ours of the landscapes, on latents instead of patches of them.
#: The batch is that script's own default.
_THEIRS = (
    "plan.diffusion.batch_size=16",
    "objective=sd",
    "backbone=plain",
    "backbone.transformer_depth=[1,0]",
    "text_encoder.mask_padding=false",
)
OURS = Arm("ours", (), Ours, by_images=True, rival=False)
RECIPE = Arm("recipe", _THEIRS, recipe, by_images=False, rival=True)
#: How much of the difference the patches are.
PATCHED = Arm("recipe in patches", (*_THEIRS, "backbone.patch_size=2"), recipe, by_images=False, rival=True)
UNPATCHED = Arm(
    "ours without patches", ("backbone=plain", "backbone.transformer_depth=[1,0]"), Ours, by_images=True,
    rival=False,
)  # fmt: skip
ARMS = {arm.name: arm for arm in (OURS, RECIPE, PATCHED, UNPATCHED)}
