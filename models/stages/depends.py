"""What of its configuration a stage depends on, and so may not change when it goes on from a checkpoint."""

from collections.abc import Mapping
from typing import Any

#: Parts of the configuration each stage depends on, which have to be the same when it goes on.
DEPENDS = {
    "autoencoder": (
        "autoencoder",
        "reconstruction",
        "data",
        "seed",
        "optimizer.autoencoder",
        "plan.autoencoder",
    ),
    "diffusion": (
        *(
            "autoencoder",
            "text_encoder",
            "backbone",
            "objective",
            "conditioning_dropout",
            "data",
            "seed",
            "ema",
        ),
        *("optimizer.diffusion", "plan.diffusion"),
    ),
    "distillation": (
        *("autoencoder", "text_encoder", "backbone", "objective.schedule", "objective.parameterization"),
        *("distillation", "decoder", "grid", "sampling.num_steps", "data", "seed", "ema"),
        *("optimizer.distillation", "plan.distillation"),
    ),
}
#: Keys below those that may differ all the same.
FREE = (
    *("images", "validate_every_images", "validation_images", "checkpoint_every_images", "log_every_images"),
    *("shards", "workers", "max_bad_fraction", "allow_change", "cache", "cache_gb", "worker_timeout"),
    # What these lead to is compared by the fingerprints of the data and of the autoencoder.
    *("precomputed", "precompute"),
)


def differences(stage: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings that `stage` depends on and that differ between two configurations, a line each.

    A key that either lacks is not compared: it came with another version, which cannot say how it ran.
    """
    was, becomes = (flatten(values, DEPENDS[stage]) for values in (before, now))
    return [
        f"{key} was {was[key]}, now {becomes[key]}"
        for key in sorted(was.keys() & becomes.keys())
        if was[key] != becomes[key] and key.rsplit(".", 1)[-1] not in FREE
    ]


def flatten(values: Any, keys: tuple[str, ...]) -> dict[str, Any]:
    """The leaves under the dotted `keys` of nested `values`, by their dotted names."""
    found: dict[str, Any] = {}

    def walk(node: Any, name: str) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                walk(value, f"{name}.{key}")
        else:
            found[name] = node

    for key in keys:
        node = values
        for part in key.split("."):
            node = node[part]
        walk(node, key)
    return found
