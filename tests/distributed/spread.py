"""Trains both stages, tiny, on ranks that share a model: `python spread.py OUT RANKS [k=v]`.

`strategy`, `shards` and others are the trainer's options by their names; `kill=32` ends rank 1 (or the only
one) by SIGKILL before the step after 32 images of the diffusion stage; a folder that holds checkpoints is
gone on with.
"""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from models.stages.launch import launch, stay_with_parent

CONFIG: dict[str, Any] = {
    "autoencoder": {
        "name": "kl", "channels": [8, 8, 8], "blocks_per_level": 1, "latent_channels": 4,
        "mid_attention": True, "norm_groups": 4,
    },
    "text_encoder": {"name": "transformer", "width": 16, "layers": 2, "heads": 2, "context_length": 12},
    "backbone": {
        "name": "unet", "channels": [8, 16], "blocks_per_level": 1, "transformer_depth": [0, 2],
        "head_dim": 8, "norm_groups": 4, "scale_shift": True, "pooled_conditioning": True, "position_size": 4,
    },
    "objective": {
        "name": "diffusion", "schedule": {"name": "flow"}, "parameterization": {"name": "flow"},
        "weighting": {"name": "unit"}, "times": {"name": "logit_normal"},
    },
}  # fmt: skip
IMAGES, BATCH = 48, 8


class Loaders:
    """What `fit` asks of a data module: pictures of 16 pixels, each a function of its index."""

    def __init__(self, kill: int) -> None:
        self.kill = kill
        self.val = range(64)
        self.batch_size = BATCH

    def train_loader(self, start: int, stop: int, rank: int = 0, size: int = 1) -> Iterator[Any]:
        """This rank's share of each batch."""
        share = BATCH // size
        for first in range(start, stop, BATCH):
            if first == self.kill and rank == size - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            yield self.batch(first + rank * share, share)

    def val_loader(self, images: int, rank: int, size: int, parts: int) -> list[Any]:
        """This rank's share of the held-out pictures."""
        first, last = images * rank // size, images * (rank + 1) // size
        return [self.batch(1000 + i, min(2, last - i)) for i in range(first, last, 2)]

    @staticmethod
    def batch(first: int, count: int) -> Any:
        """`count` pictures and captions."""
        import torch

        from data.batch import Batch
        from models.text_encoder import Tokenizer

        pictures = []
        for index in range(first, first + count):
            rng = torch.Generator().manual_seed(index)
            coarse = torch.randint(0, 256, (1, 3, 4, 4), generator=rng).float()
            pictures.append(torch.nn.functional.interpolate(coarse, (16, 16), mode="bilinear")[0].byte())
        captions = [("sea at dawn", "hills", "")[i % 3] for i in range(first, first + count)]
        tokens, keys = Tokenizer(12)(captions), [str(i) for i in range(first, first + count)]
        return Batch(torch.stack(pictures), tokens, torch.arange(first, first + count), captions, keys)


def stages(options: Any) -> list[Any]:
    """Fresh stages of seed 0."""
    import torch

    from models.loading import build_networks
    from models.registry import build
    from models.stages.autoencoder import AutoencoderStage
    from models.stages.averages import PowerFunctionAverage
    from models.stages.compute import Compute
    from models.stages.diffusion import DiffusionStage
    from models.stages.losses import ReconstructionLoss
    from models.stages.optim import AdamW
    from models.stages.plan import Plan

    torch.manual_seed(0)
    autoencoder, text_encoder, backbone = build_networks(CONFIG)
    frozen = build_networks(CONFIG)[0]
    plan = Plan(
        IMAGES, BATCH, warmup_images=0, ema_halflife_images=40, gradient_clip=0.2, validate_every_images=24,
        validation_images=9, checkpoint_every_images=16, log_every_images=16,
    )  # fmt: skip
    # Of the rounding of a gradient next to nothing Adam makes a whole learning rate; not with this eps.
    optimizer = AdamW(2e-3, eps=1e-5)
    here = Compute(
        torch.device("cpu"), False, False, False, "in a test", True, options.checkpoint_activations
    )
    objective = build("objective", CONFIG["objective"])
    return [
        AutoencoderStage(autoencoder, ReconstructionLoss(half_size_weight=0.5), optimizer, plan, here, 0),
        DiffusionStage(
            frozen, text_encoder, backbone, objective, 0.1, optimizer, plan, here, 0,
            PowerFunctionAverage((0.05, 0.10), snapshot_every_images=BATCH, half=False),
        ),
    ]  # fmt: skip


def run(folder: Path, words: dict[str, str]) -> None:
    """Trains what is left of both stages."""
    import torch

    from models.checkpoint import newest
    from models.stages.compute import Strategy, TrainerOptions
    from models.stages.fit import Work, fit
    from models.stages.logs import CsvLog
    from models.stages.ranks import Ranks
    from models.stages.session import Session
    from models.stages.sharded import Sharding, shards_of
    from models.stages.stage import restore_networks

    torch.set_num_threads(1)
    kill = int(words.pop("kill", "-1"))
    strategy = Strategy[words.pop("strategy", "auto")]
    options = TrainerOptions(strategy=strategy, trace=True, **{k: int(v) for k, v in words.items()})
    with Ranks.join(60, 60) as ranks:
        shards = shards_of(options, ranks.size)
        sharding = Sharding(shards, ranks.size, torch.device("cpu")) if shards > 1 else None
        for stage in stages(options):
            stage.sharding = sharding
            stage.configure_model()
            parent = folder / stage.name / "checkpoints"
            checkpoint = newest(parent) if parent.is_dir() else None
            ranks.wait()
            if checkpoint is not None:
                restore_networks(stage, checkpoint)
                if stage.images_seen >= IMAGES:
                    continue
            loaders: Any = Loaders(kill if stage.name == "diffusion" else -1)

            def finish(stage: Any = stage, loaders: Any = loaders) -> None:
                if stage.name == "autoencoder":
                    stage.finish(loaders.train_loader(IMAGES, IMAGES + 16))

            session = Session(folder, {"a": 1}, options, CsvLog(), ranks=ranks)
            fit(Work(stage, loaders, {}, checkpoint, finish, lambda seen: folder / "none.png"), session)
        ranks.wait()


if __name__ == "__main__":
    count = int(sys.argv[2])
    if count > 1 and "RANK" not in os.environ:
        sys.exit(launch(count))
    stay_with_parent()
    run(Path(sys.argv[1]), dict(word.split("=") for word in sys.argv[3:]))
