"""The shape of a procedural landscape: ridges from far to near, the horizon and the water's edge.

A ridge is a window of a long cached line of noise, so there are as many shapes as offsets, stretches and
envelopes. Geometry reads its own block of draws and never looks at the time, the sky or the side of the
light: a scene with one of those replaced is the same place.

Used by `data.landscape_painter`: `land_of(scene, frame, tables)`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from data.landscape_noise import OFFSETS, SCREENS, Textures
from data.landscape_scenes import Draws, Purpose, Scene, Terrain

Array = np.ndarray
_MARGIN = 0.25  # lines are cut this much wider than the picture, for slopes looked up beside it


@dataclass(frozen=True)
class Frame:
    """Pixel centres of one resolution: `at` [R], `wide` [R + 2 margins]."""

    size: int
    at: Array
    wide: Array
    columns: Array


@lru_cache(maxsize=4)
def frame_of(resolution: int) -> Frame:
    """The pixel centres of pictures of `resolution` pixels a side, 0 left or top to 1."""
    at = ((np.arange(resolution) + 0.5) / resolution).astype(np.float32)
    margin = int(_MARGIN * resolution)
    wide = ((np.arange(-margin, resolution + margin) + 0.5) / resolution).astype(np.float32)
    return Frame(resolution, at, wide, np.arange(resolution, dtype=np.float32) + margin)


@dataclass(frozen=True)
class Ridge:
    """One layer of land: `top` [R] its edge, `slope` [R + 2 margins] d(top)/dx, `distance` 0 near to 1 far.

    `rocky` tells bare rock from soil or sand.
    """

    top: Array
    slope: Array
    distance: float
    rocky: bool = False


@dataclass(frozen=True)
class Land:
    """The geometry of a scene: ridges far to near, the rows of the water, and a window into the textures."""

    ridges: tuple[Ridge, ...]
    horizon: float
    water: float
    window: tuple[int, int]
    hue: float
    tone: float
    style: float
    drift: float


def _cut(line: Array, frame: Frame, start: float, stretch: float) -> Array:
    """The window of a periodic line [SCREENS * R] that begins at `start` widths, `stretch` widths long."""
    position = (frame.wide * np.float32(stretch) + np.float32(start)) * frame.size
    whole = position.astype(np.int64)
    part = (position - whole).astype(np.float32)
    low = line.take(whole, mode="wrap")
    return low + part * (line.take(whole + 1, mode="wrap") - low)


def _ridge(
    frame: Frame,
    draw: Draws,
    line: Array,
    base: float,
    height: float,
    distance: float,
    rough: Array | None = None,
) -> Ridge:
    """A ridge over `base` with peaks of about `height`; `rough` is a line with finer detail for the edge."""
    start, stretch = draw.between(1.0, SCREENS - 3.0), draw.between(0.7, 1.35)
    peak, focus = draw.between(0.1, 0.9), draw.between(0.0, 0.5)
    envelope = np.float32(height) * (
        1.0 - focus * np.minimum(np.abs(frame.wide - np.float32(peak)) * 1.6, 1.0)
    )
    smooth = base - envelope * _cut(line, frame, start, stretch)
    edge = smooth if rough is None else base - envelope * _cut(rough, frame, start, stretch)
    step = max(frame.size // 64, 1)
    slope = np.empty_like(smooth)
    slope[step:-step] = (smooth[2 * step :] - smooth[: -2 * step]) * np.float32(frame.size / (2 * step))
    slope[:step], slope[-step:] = slope[step], slope[-step - 1]
    margin = int(_MARGIN * frame.size)
    return Ridge(edge[margin:-margin], slope, distance, rough is not None)


def _jagged(ridge: Ridge, frame: Frame, draw: Draws, line: Array, height: float) -> Ridge:
    """`ridge` with trees of about `height` along its edge."""
    start = draw.between(1.0, SCREENS - 3.0)
    margin = int(_MARGIN * frame.size)
    trees = _cut(line, frame, start, 1.0)[margin:-margin]
    return Ridge(ridge.top - np.float32(height) * trees, ridge.slope, ridge.distance)


def _mountains(frame: Frame, tables: Textures, draw: Draws) -> tuple[list[Ridge], float, float]:
    horizon = draw.between(0.54, 0.64)
    lake = draw.between(0.74, 0.84) if draw.chance(0.35) else 1.0
    peaks = draw.between(0.32, 0.46)
    ridges = [
        _ridge(frame, draw, tables.massif, horizon, draw.between(0.16, 0.3), 0.8, tables.crags),
        _ridge(frame, draw, tables.massif, horizon + 0.07, peaks, 0.45, tables.crags),
    ]
    near = _ridge(frame, draw, tables.massif, draw.between(0.78, 0.9), draw.between(0.08, 0.2), 0.18)
    ridges.append(_jagged(near, frame, draw, tables.firs, 0.035))
    if lake == 1.0:
        front = _ridge(frame, draw, tables.downs, draw.between(0.92, 1.02), draw.between(0.06, 0.14), 0.0)
        ridges.append(_jagged(front, frame, draw, tables.firs, 0.06))
    return ridges, horizon, lake


def _hills(frame: Frame, tables: Textures, draw: Draws) -> tuple[list[Ridge], float, float]:
    horizon = draw.between(0.48, 0.6)
    count = draw.choose((3, 4, 4, 5))
    ridges = []
    for k in range(count):
        near = k / (count - 1)
        base = horizon + 0.04 + (0.98 - horizon) * near**1.15
        ridge = _ridge(
            frame, draw, tables.downs, base, 0.08 + 0.14 * near + draw.between(0.0, 0.08), 0.8 * (1 - near)
        )
        if draw.chance(0.5) and k > 0:
            ridge = _jagged(ridge, frame, draw, tables.crowns, 0.012 + 0.026 * near)
        ridges.append(ridge)
    return ridges, horizon, 1.0


def _desert(frame: Frame, tables: Textures, draw: Draws) -> tuple[list[Ridge], float, float]:
    horizon = draw.between(0.52, 0.62)
    ridges = []
    if draw.chance(0.4):
        mesas = _ridge(frame, draw, tables.massif, horizon + 0.05, draw.between(0.14, 0.26), 0.75)
        flat = horizon + 0.05 - draw.between(0.07, 0.13)
        ridges.append(Ridge(np.maximum(mesas.top, np.float32(flat)), mesas.slope, 0.75, rocky=True))
    count = draw.choose((2, 3, 3, 4))
    for k in range(count):
        near = k / (count - 1)
        base = horizon + 0.05 + (0.98 - horizon) * near**1.1
        height = 0.07 + 0.15 * near + draw.between(0.0, 0.07)
        ridges.append(_ridge(frame, draw, tables.dunes, base, height, 0.6 * (1 - near)))
    return ridges, horizon, 1.0


def _sea(frame: Frame, tables: Textures, draw: Draws) -> tuple[list[Ridge], float, float]:
    horizon = round(draw.between(0.46, 0.64) * OFFSETS) / OFFSETS
    ridges = []
    if draw.chance(0.5):
        line, rough = draw.choose(((tables.downs, None), (tables.massif, tables.crags)))
        island = _ridge(frame, draw, line, horizon - 0.02, draw.between(0.03, 0.12), 0.6, rough)
        at, reach = draw.between(-0.05, 1.05), draw.between(0.12, 0.4)
        fall = np.float32(0.16) * np.minimum(np.abs(frame.at - np.float32(at)) / np.float32(reach), 1) ** 3
        ridges.append(Ridge(island.top + fall, island.slope, 0.6))
    return ridges, horizon, horizon


_GEOMETRY: dict[Terrain, Callable[[Frame, Textures, Draws], tuple[list[Ridge], float, float]]] = {
    Terrain.MOUNTAINS: _mountains,
    Terrain.HILLS: _hills,
    Terrain.DESERT: _desert,
    Terrain.SEA: _sea,
}


def land_of(scene: Scene, frame: Frame, tables: Textures) -> Land:
    """The land of a scene, drawn from its own counter: the same at every resolution, but for the pixels."""
    draw = scene.draws(Purpose.GEOMETRY)
    window = int(draw.between(0, OFFSETS)), int(draw.between(0, OFFSETS))
    hue, tone, style, drift = (draw.between(-1.0, 1.0) for _ in range(4))
    ridges, horizon, water = _GEOMETRY[scene.terrain](frame, tables, draw)
    water = round(water * OFFSETS) / OFFSETS
    return Land(tuple(ridges), horizon, water, window, hue, tone, style, drift)


def window(tile: Array, frame: Frame, at: tuple[int, int], rows: int) -> Array:
    """The first `rows` rows of the picture's window of a tile; `at` counts 1/OFFSETS of a picture."""
    top, left = (at[0] % OFFSETS) * frame.size // OFFSETS, (at[1] % OFFSETS) * frame.size // OFFSETS
    return tile[top : top + rows, left : left + frame.size]
