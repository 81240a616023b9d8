"""What a procedural landscape shows: four factors, drawn by a counter, and the numbers everything else is
made of.

A scene is six values: its factors and the (seed, index) it was drawn from. All other randomness, the shape
of the ridges, the layout of the clouds, the words of the caption, is read from `scene.draws(purpose)`: a
block of uniform numbers that depends on seed, index and purpose only. So `dataclasses.replace(scene,
time=Time.NIGHT)` is the same place at another hour: the geometry reads its own block and never looks at the
other factors.

Used by `data.landscapes`, which is the module to import from.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from functools import lru_cache
from typing import TypeVar

import numpy as np

T = TypeVar("T")


class Time(Enum):
    """The hour of the day."""

    DAWN = "dawn"
    NOON = "noon"
    SUNSET = "sunset"
    NIGHT = "night"


class Terrain(Enum):
    """The kind of land."""

    MOUNTAINS = "mountains"
    HILLS = "hills"
    DESERT = "desert"
    SEA = "sea"


class Light(Enum):
    """The side of the picture on which the sun or the moon stands."""

    LEFT = "left"
    CENTRE = "centre"
    RIGHT = "right"


class Sky(Enum):
    """Clouds or none."""

    CLEAR = "clear"
    CLOUDY = "cloudy"


FACTORS: dict[str, type[Enum]] = {"time": Time, "terrain": Terrain, "light": Light, "sky": Sky}


class Purpose(IntEnum):
    """What a block of draws is for; the value is part of the counter, so never renumber."""

    FACTORS = 0
    GEOMETRY = 1
    LIGHT = 2
    SKY = 3
    CAPTION = 4


_BLOCK = {Purpose.FACTORS: 4, Purpose.GEOMETRY: 64, Purpose.LIGHT: 24, Purpose.SKY: 16, Purpose.CAPTION: 32}
_START = dict(zip(_BLOCK, np.cumsum([0, *_BLOCK.values()]).tolist(), strict=False))
_TOTAL = sum(_BLOCK.values())


class Draws:
    """A block of uniform numbers, taken one after another."""

    def __init__(self, values: Sequence[float]) -> None:
        self._next = iter(values).__next__

    def between(self, low: float, high: float) -> float:
        """A number in [low, high)."""
        return low + (high - low) * self._next()

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self._next() < probability

    def choose(self, options: Sequence[T]) -> T:
        """One of `options`, each as likely."""
        return options[int(self._next() * len(options))]


@dataclass(frozen=True)
class Scene:
    """Returns one landscape before it is drawn: its four factors and the counter all else is drawn from."""

    time: Time
    terrain: Terrain
    light: Light
    sky: Sky
    seed: int
    index: int

    def draws(self, purpose: Purpose) -> Draws:
        """The block of draws for `purpose`: a pure function of (seed, index, purpose)."""
        return _draws(self.seed, self.index, purpose)


@lru_cache(maxsize=64)
def _numbers(seed: int, index: int) -> tuple[float, ...]:
    """All numbers of a scene; kept a while, because one picture asks for five blocks of them."""
    key = np.array([seed, index], dtype=np.uint64)
    return tuple(np.random.Generator(np.random.Philox(key=key)).random(_TOTAL).tolist())


def _draws(seed: int, index: int, purpose: Purpose) -> Draws:
    start = _START[purpose]
    return Draws(_numbers(seed, index)[start : start + _BLOCK[purpose]])


def draw_scene(seed: int, index: int) -> Scene:
    """The scene at `index` of the endless sequence `seed`: factors uniform and independent of one another.

    A pure function of its arguments (Philox counter, Salmon et al. 2011). Raises ValueError for a negative
    seed or index.
    """
    if seed < 0 or index < 0:
        raise ValueError(f"draw_scene: seed {seed} and index {index} must not be negative; count from 0")
    draw = _draws(seed, index, Purpose.FACTORS)
    return Scene(
        draw.choose(tuple(Time)),
        draw.choose(tuple(Terrain)),
        draw.choose(tuple(Light)),
        draw.choose(tuple(Sky)),
        seed,
        index,
    )


def factors(scene: Scene) -> dict[str, str]:
    """The four factors of `scene` by name, as the words their enums hold."""
    return {
        "time": scene.time.value,
        "terrain": scene.terrain.value,
        "light": scene.light.value,
        "sky": scene.sky.value,
    }
