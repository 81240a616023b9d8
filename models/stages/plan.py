"""How long and in which portions a stage trains. Every horizon and interval is counted in images."""

import math


class Plan:
    """The plan of one stage.

    Args:
        images: training images until the stage is done.
        batch_size: images a step, over all devices together.
        warmup_images: the learning rate rises over so many.
        cooldown_fraction: last part of the run in which the learning rate falls to 0; 0 keeps it constant.
        ema_halflife_images: images until a weight's share in the average has halved.
        gradient_clip: largest norm of all gradients together.
        validate_every_images: held-out losses and pictures so often, and at the end.
        validation_images: held-out images that the losses are measured on.
        checkpoint_every_images: a checkpoint so often, and at the end.
        log_every_images: a line of metrics so often.
    """

    def __init__(
        self,
        images: int = 100_000,
        batch_size: int = 64,
        warmup_images: int = 1_000,
        cooldown_fraction: float = 0.5,
        ema_halflife_images: int = 5_000,
        gradient_clip: float = 1.0,
        validate_every_images: int = 20_000,
        validation_images: int = 256,
        checkpoint_every_images: int = 20_000,
        log_every_images: int = 1_024,
    ) -> None:
        counts = {
            "images": images,
            "batch_size": batch_size,
            "ema_halflife_images": ema_halflife_images,
            "validate_every_images": validate_every_images,
            "validation_images": validation_images,
            "checkpoint_every_images": checkpoint_every_images,
            "log_every_images": log_every_images,
        }
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} is {value}, but must be at least 1")
        if warmup_images < 0:
            raise ValueError(f"warmup_images is {warmup_images}, but must not be negative")
        if not 0 <= cooldown_fraction <= 1:
            raise ValueError(f"cooldown_fraction is {cooldown_fraction}, but must lie in [0, 1]")
        if not (math.isfinite(gradient_clip) and gradient_clip > 0):
            raise ValueError(f"gradient_clip is {gradient_clip}, but must be a positive number")
        self.images = images
        self.batch_size = batch_size
        self.warmup_images = warmup_images
        self.cooldown_fraction = cooldown_fraction
        self.ema_halflife_images = ema_halflife_images
        self.gradient_clip = gradient_clip
        self.validate_every_images = validate_every_images
        self.validation_images = validation_images
        self.checkpoint_every_images = checkpoint_every_images
        self.log_every_images = log_every_images

    @property
    def steps(self) -> int:
        """Optimizer steps until the stage is done; the last one may pass `images`."""
        return -(-self.images // self.batch_size)
