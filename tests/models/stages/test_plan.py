"""The plan of a stage: counted in images, refused where it makes no sense."""

import pytest

from models.stages.plan import Plan


def test_steps_cover_all_images() -> None:
    assert [Plan(images=images, batch_size=32).steps for images in (1, 32, 33, 64)] == [1, 1, 2, 2]


@pytest.mark.parametrize(
    ("key", "value"),
    [("images", 0), ("batch_size", -1), ("warmup_images", -1), ("cooldown_fraction", 1.5),
     ("log_every_images", 0),
     ("gradient_clip", 0.0), ("gradient_clip", float("nan")), ("validation_images", 0),
     ("ema_halflife_images", 0), ("validate_every_images", 0), ("checkpoint_every_images", 0),
     ("cooldown_fraction", float("nan"))],
)  # fmt: skip
def test_values_out_of_range(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{key} is {value}, but must"):
        Plan(**{key: value})
