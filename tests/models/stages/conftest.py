"""Tiny networks, batches and a way to compute, shared by the tests of the stages."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from data.batch import Batch
from models.diffusion.distillation import Distillation, Lesson
from models.diffusion.grids import uniform_grid
from models.diffusion.guidance import Guidance
from models.loading import build_networks
from models.registry import build
from models.stages.autoencoder import AutoencoderStage
from models.stages.compute import Compute
from models.stages.diffusion import DiffusionStage
from models.stages.distillation import DistillationStage
from models.stages.losses import ReconstructionLoss
from models.stages.optim import AdamW, OptimizerSettings
from models.stages.plan import Plan
from models.text_encoder import Tokenizer
from models.tiny_decoder import TinyDecoder

CAPTIONS = ["dawn over the sea", "noon", "hills at night", "snow", "a cloudy dusk", "desert", "", "the moon"]


@pytest.fixture
def compute() -> Compute:
    return Compute(torch.device("cpu"), False, False, False, "in a test")


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    """`make_batch(count, first)`: smooth random pictures of 16 pixels, the same for the same indices."""

    def make(count: int, first: int = 0) -> Batch:
        pictures = []
        for index in range(first, first + count):
            rng = torch.Generator().manual_seed(index)
            coarse = torch.randint(0, 256, (1, 3, 4, 4), generator=rng).float()
            pictures.append(torch.nn.functional.interpolate(coarse, (16, 16), mode="bilinear")[0].byte())
        captions = [CAPTIONS[i % len(CAPTIONS)] for i in range(first, first + count)]
        indices = torch.arange(first, first + count)
        keys = [f"key-{i}" for i in range(first, first + count)]
        return Batch(torch.stack(pictures), Tokenizer(12)(captions), indices, captions, keys)

    return make


@pytest.fixture
def make_stage(compute: Compute, tiny_config: dict[str, Any]) -> Callable[..., Any]:
    """`make_stage("diffusion", seed=0, plan=..., dropout=...)`: a fresh stage of tiny networks."""

    def make(
        name: str,
        seed: int = 0,
        plan: Plan | None = None,
        dropout: float = 0.1,
        optimizer: OptimizerSettings | None = None,
        **parts: dict[str, Any],
    ) -> AutoencoderStage | DiffusionStage | DistillationStage:
        optimizer = AdamW(2e-3) if optimizer is None else optimizer
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            autoencoder, text_encoder, backbone = build_networks(tiny_config | parts)
        plan = plan if plan is not None else Plan(batch_size=4, images=16, warmup_images=0)
        if name == "autoencoder":
            return AutoencoderStage(autoencoder, ReconstructionLoss(), optimizer, plan, compute, 0)
        objective = build("objective", tiny_config["objective"])
        if name == "distillation":
            segments = Distillation(2).segments(uniform_grid, objective, 2)
            lesson = Lesson(objective, segments, Guidance(), 3.0)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                decoder = TinyDecoder(autoencoder.latent_channels, autoencoder.factor, 8, 1)
            return DistillationStage(
                autoencoder, text_encoder, backbone, decoder, lesson, optimizer, plan, compute, 0
            )
        return DiffusionStage(
            autoencoder, text_encoder, backbone, objective, dropout, optimizer, plan, compute, 0
        )

    return make
