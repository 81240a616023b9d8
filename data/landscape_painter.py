"""The picture of a procedural landscape, painted from back to front in about a millisecond at 64 x 64.

The canvas is float32 [3 H W] in picture coordinates: x and y in [0, 1], y down. The sky is one matrix product
(rows of gradient and glow times columns), clouds and waves are windows of cached textures, and every layer of
land is blended over the rows it covers and no others. The geometry comes from `data.landscape_geometry`, the
light from `data.landscape_light`.

Used through `data.landscapes.render`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data.landscape_geometry import Frame, Land, Ridge, frame_of, land_of, window
from data.landscape_light import Atmosphere, atmosphere, colour
from data.landscape_noise import OFFSETS, Textures, textures
from data.landscape_scenes import Draws, Purpose, Scene, Sky, Terrain, Time

Array = np.ndarray


def _unit(values: Array) -> Array:
    """`values` clipped to [0, 1] in place."""
    np.maximum(values, 0, out=values)
    return np.minimum(values, 1, out=values)


# ----------------------------------------------------------------------------------------------- sky


def _bell(at: Array, centre: float, width: float) -> Array:
    return np.exp(-(((at - np.float32(centre)) / np.float32(width)) ** 2))


def _paint_sky(canvas: Array, frame: Frame, air: Atmosphere, scene: Scene, horizon: float, rows: int) -> None:
    """The gradient and three glows, as one product [rows K] x [K 3W]."""
    at = frame.at[:rows]
    stops = np.array([0.0, 0.38, 0.74, 1.0]) * horizon
    gradient = np.stack([np.interp(at, stops, air.sky[:, c]) for c in range(3)])
    strength = {Time.DAWN: 0.5, Time.NOON: 0.55, Time.SUNSET: 0.62, Time.NIGHT: 0.34}[scene.time]
    if scene.sky is Sky.CLOUDY:
        strength *= 0.85
    falls = np.stack([_bell(at, air.y, width) for width in (0.08, 0.2, 0.13)], 1)
    spans = np.stack([_bell(frame.at, air.x, width) for width in (0.08, 0.24, 0.55)])
    weights = (
        np.array([0.75, 0.5, 0.45 if scene.time in (Time.DAWN, Time.SUNSET) else 0.1], np.float32) * strength
    )
    glow = (falls * weights) @ spans
    room = air.glow[:, None] - gradient.astype(np.float32)
    canvas[:, :rows] = gradient[:, :, None]
    canvas[:, :rows] += room[:, :, None] * np.minimum(glow, 1.0)


def _paint_disc(
    canvas: Array,
    frame: Frame,
    tables: Textures,
    air: Atmosphere,
    skyline: Array,
    veil: Array | None,
    moon: bool,
) -> None:
    """Sun or moon with a soft edge, above the `skyline` [W] and behind a `veil` of cloud [rows W]."""
    reach = air.radius * 1.4
    top, bottom = max(int((air.y - reach) * frame.size), 0), int((air.y + reach) * frame.size) + 2
    left, right = max(int((air.x - reach) * frame.size), 0), int((air.x + reach) * frame.size) + 2
    patch = canvas[:, top:bottom, left:right]
    rows, columns = frame.at[top:bottom, None] - np.float32(air.y), frame.at[left:right] - np.float32(air.x)
    sharp = frame.size * 0.8
    edge = _unit((air.radius - np.sqrt(rows * rows + columns * columns)) * sharp + 0.5)
    edge *= _unit((skyline[left:right] - frame.at[top:bottom, None]) * frame.size + 0.5)
    if veil is not None:
        cloud = veil[top:bottom, left:right]
        edge[: cloud.shape[0]] *= 1.0 - 0.5 * cloud
    tint = air.disc[:, None, None]
    if moon:
        # The terminator is half an ellipse; it runs from full (-1) to a thick crescent.
        limb = np.sqrt(np.maximum(air.radius**2 - rows * rows, 0)) * np.float32(
            min(abs(air.phase) * 2.4 - 2.2, 0.15)
        )
        edge *= _unit((columns * (1 if air.phase > 0 else -1) - limb) * sharp + 0.5)
        tint = tint * (1.0 - 0.07 * _unit(tables.relief[top:bottom, left:right] + 0.5))
    patch += edge * (tint - patch)


def _paint_stars(
    canvas: Array, frame: Frame, tables: Textures, air: Atmosphere, draw: Draws, rows: int
) -> None:
    at = int(draw.between(0, OFFSETS)), int(draw.between(0, OFFSETS))
    fade = np.clip(1.15 - frame.at[:rows, None] * np.float32(frame.size / rows) * 0.9, 0.1, 1)
    near = 1.0 - _bell(frame.at[:rows], air.y, 0.2)[:, None] * _bell(frame.at, air.x, 0.2)
    stars = window(tables.stars, frame, at, rows) * fade * near
    if draw.chance(0.5):
        slant, middle = draw.between(-0.7, 0.7), draw.between(0.2, 0.8)
        band = _bell(frame.at + np.float32(slant) * (frame.at[:rows, None] - 0.3), middle, 0.13) * near
        dust = 0.5 + 0.3 * window(tables.cumulus, frame, at, rows)
        stars += np.float32(0.16) * band * np.clip(dust, 0, 1) * fade
    canvas[:, :rows] += stars


def _paint_clouds(
    canvas: Array, frame: Frame, tables: Textures, air: Atmosphere, draw: Draws, horizon: float, rows: int
) -> Array:
    """Clouds lit from the side of the light; returns their density [rows W] in [0, 1]."""
    above = int(draw.between(0, OFFSETS)), int(draw.between(0, OFFSETS))
    below = int(draw.between(0, OFFSETS)), int(draw.between(0, OFFSETS))
    streaks, cover, soft = draw.between(-0.5, 0.6), draw.between(0.1, 0.9), draw.between(1.0, 1.6)
    banks = draw.between(0.0, 0.9)
    flat = np.clip((frame.at[:rows, None] / horizon - 0.45) * 1.6 + streaks, 0, 1)
    density = window(tables.cumulus, frame, above, rows)
    density = density + flat * (window(tables.stratus, frame, below, rows) - density)
    density = density * np.float32(1.0 - 0.45 * banks) + window(
        tables.swirl, frame, below, rows
    ) * np.float32(banks)
    density += np.float32(cover) - np.float32(0.8) * density.mean()
    veil = np.clip(density / np.float32(soft), 0, 1)
    veil *= veil * (3.0 - 2.0 * veil)
    step = max(frame.size * 2 // 64, 1)
    side = np.clip((np.float32(air.x) - frame.at[step:-step]) * 3.0, -1, 1)
    light = np.empty_like(density)
    light[:, step:-step] = (density[:, : -2 * step] - density[:, 2 * step :]) * (side * 0.5)
    light[:, :step], light[:, -step:] = light[:, step : step + 1], light[:, -step - 1 : -step]
    # The undersides of clouds are lit where the sun stands low, their tops where it stands high.
    upright = np.float32(0.4 if air.y < 0.3 else -0.15)
    light[step:-step] += (density[2 * step :] - density[: -2 * step]) * upright
    light += 0.72 - 0.26 * np.clip(density, 0, 2)
    light += 0.5 * _bell(frame.at[:rows], air.y, 0.2)[:, None] * _bell(frame.at, air.x, 0.22)
    np.clip(light, 0, 1, out=light)
    tint = air.cloud_shade[:, None, None] + (air.cloud_lit - air.cloud_shade)[:, None, None] * light
    patch = canvas[:, :rows]
    patch += (veil * np.float32(0.93)) * (tint - patch)
    return veil


# ---------------------------------------------------------------------------------------------- land


@dataclass(frozen=True)
class _Cloth:
    """The rows a ridge covers, and how: first row, cover [h W], depth below the edge [h W], light [h W]."""

    first: int
    cover: Array
    depth: Array
    light: Array


def _cloth(
    ridge: Ridge,
    frame: Frame,
    air: Atmosphere,
    wander: Array | None,
    drift: float,
    steep: float,
    fade: float = 0.0,
) -> _Cloth:
    """Cover and light of `ridge`; the lines between lit and shaded faces run down from its peaks.

    `wander` [R R] bends those lines, `drift` slants them, `steep` is the slope at which a face is fully lit,
    `fade` how fast the difference is lost below the edge.
    """
    first = max(int(ridge.top.min() * frame.size) - 1, 0)
    depth = frame.at[first:, None] - ridge.top
    cover = _unit(depth * np.float32(frame.size) + 0.5)
    side = np.clip((np.float32(air.x) - frame.at) * 5.0, -1, 1) * np.float32(0.5 * air.contrast)
    face = np.clip(ridge.slope * np.float32(1 / steep), -1, 1)
    shift = depth * np.float32(-drift * frame.size)
    if wander is not None:
        reach = np.minimum(np.maximum(depth, 0) * np.float32(0.6 * frame.size), np.float32(0.05 * frame.size))
        reach *= wander[first:]
        shift -= reach
    shift += frame.columns
    light = face.take(shift.astype(np.intp), mode="clip")
    light *= side
    if fade > 0.0:
        light *= np.maximum(1.0 - depth * np.float32(fade), 0.1)
    light += 0.5
    return _Cloth(first, cover, depth, light)


def _hazy(air: Atmosphere, frame: Frame) -> Array:
    """The colour of the distance [3 1 W]: the horizon, warmer below the light."""
    span = _bell(frame.at, air.x, 0.3) * np.float32(0.5)
    return (air.haze[:, None] + (air.glow - air.haze)[:, None] * span)[:, None, :]


def _paint_ridge(
    canvas: Array, cloth: _Cloth, albedo: Array, air: Atmosphere, haze: Array, far: float
) -> None:
    """Blends a ridge of colour `albedo` ([3 1 1] or [3 h W]) over the canvas, through mist and distance."""
    tint = albedo * (air.ambient[:, None, None] + air.key[:, None, None] * cloth.light)
    thick = _unit(cloth.depth * 4.0) * np.float32(air.mist * (0.35 + far)) + np.float32(0.75 * far)
    tint += np.minimum(thick, 0.92) * (haze - tint)
    patch = canvas[:, cloth.first :]
    patch += cloth.cover * (tint - patch)


def _varied(code: str, land: Land, spread: float = 0.1) -> Array:
    """A colour [3 1 1], warmer or cooler, lighter or darker by the scene's own hue and tone."""
    shift = np.array([1.0, 0.15, -0.9], np.float32) * np.float32(land.hue * spread)
    return (colour(code) * (1.0 + shift) * np.float32(1.0 + 0.12 * land.tone))[:, None, None]


def _mix(first: Array, second: Array, weight: Array | np.float32) -> Array:
    return first + (second - first) * weight


def _paint_mountains(canvas: Array, frame: Frame, tables: Textures, land: Land, air: Atmosphere) -> None:
    haze = _hazy(air, frame)
    relief, rock = (window(tile, frame, land.window, frame.size) for tile in (tables.relief, tables.rock))
    stone, snow = _varied("857e86", land), colour("ffffff")[:, None, None]
    wood, meadow, firs = _varied("4a6650", land), _varied("6f8a4c", land, 0.2), _varied("2f4a38", land)
    side = np.clip((np.float32(air.x) - frame.at) * 5.0, -1, 1) * np.float32(0.11 * air.contrast)
    crag = rock * side
    for ridge in (ridge for ridge in land.ridges if ridge.rocky):
        cloth = _cloth(ridge, frame, air, relief, land.drift * 0.5, 0.8, 1.5)
        cloth.light[:] += crag[cloth.first :]
        top = float(ridge.top.min())
        snowline = np.float32(top + (land.horizon - top) * (0.45 + 0.15 * land.style))
        low = frame.at[cloth.first :, None] + 0.03 * relief[cloth.first :] + 0.01 * rock[cloth.first :]
        white = _unit((snowline - low) * 18.0 + 0.5)
        green = _unit((low - np.float32(land.horizon - 0.03)) * 10.0)
        _paint_ridge(canvas, cloth, _mix(_mix(stone, wood, green), snow, white), air, haze, ridge.distance)
    clumps = window(tables.clumps, frame, land.window, frame.size)
    for ridge in (ridge for ridge in land.ridges if not ridge.rocky):
        cloth = _cloth(ridge, frame, air, None, land.drift, 1.6, 4.0)
        cloth.light[:] = cloth.light * 0.5 + 0.15 + clumps[cloth.first :] * 0.08
        trees = (
            _unit(0.5 + clumps[cloth.first :] - cloth.depth * 12.0) if land.tone > 0.1 else np.float32(1.0)
        )
        _paint_ridge(canvas, cloth, _mix(meadow, firs, trees), air, haze, ridge.distance)


def _paint_hills(canvas: Array, frame: Frame, tables: Textures, land: Land, air: Atmosphere) -> None:
    haze = _hazy(air, frame)
    meadow, field, wood = (
        _varied("86a850", land, 0.18),
        _varied("b4ac5c", land, 0.18),
        _varied("48683e", land),
    )
    sparse = np.float32(0.9 + 0.6 * land.style)
    for number, ridge in enumerate(land.ridges):
        cloth = _cloth(ridge, frame, air, None, land.drift * 0.6, 0.55, 1.6)
        place = land.window[0] + 23 * number, land.window[1] + 41 * number
        patches = window(tables.clumps, frame, place, frame.size)[cloth.first :]
        groves = window(tables.swirl, frame, place, frame.size)[cloth.first :]
        trees = _unit((patches * 0.6 + groves * 0.8 - sparse) * 1.1)
        ground = meadow if (number + int(land.tone > 0)) % 2 else _mix(meadow, field, np.float32(0.6))
        cloth.light[:] += patches * 0.045 + (0.12 - 0.5 * np.minimum(cloth.depth, 0.3))
        _paint_ridge(canvas, cloth, _mix(ground, wood, trees), air, haze, ridge.distance)


def _paint_desert(canvas: Array, frame: Frame, tables: Textures, land: Land, air: Atmosphere) -> None:
    haze = _hazy(air, frame)
    sand, stone = _varied("e8ac64", land, 0.06), _varied("a8664a", land, 0.1)
    swirl, rock = (window(tile, frame, land.window, frame.size) for tile in (tables.swirl, tables.rock))
    ripples = window(tables.stratus, frame, land.window, frame.size) * np.float32(0.03)
    for ridge in land.ridges:
        rocky = ridge.rocky
        cloth = _cloth(ridge, frame, air, swirl, 0.0 if rocky else land.drift * 1.3, 0.5, 1.2)
        cloth.light[:] += rock[cloth.first :] * 0.07 if rocky else ripples[cloth.first :]
        cloth.light[:] = cloth.light * 1.1 - 0.25 * np.minimum(cloth.depth, 0.4)
        _paint_ridge(canvas, cloth, stone if rocky else sand, air, haze, ridge.distance * 0.65)


def _paint_sea(canvas: Array, frame: Frame, tables: Textures, land: Land, air: Atmosphere) -> None:
    haze = _hazy(air, frame)
    rock = window(tables.rock, frame, land.window, frame.size)
    for ridge in land.ridges:
        cloth = _cloth(ridge, frame, air, None, 0.0, 1.0)
        cloth.light[:] += rock[cloth.first :] * 0.06
        _paint_ridge(canvas, cloth, _varied("5a6650", land), air, haze, 0.5)


_PAINT: dict[Terrain, Callable[[Array, Frame, Textures, Land, Atmosphere], None]] = {
    Terrain.MOUNTAINS: _paint_mountains,
    Terrain.HILLS: _paint_hills,
    Terrain.DESERT: _paint_desert,
    Terrain.SEA: _paint_sea,
}


def _paint_water(canvas: Array, frame: Frame, tables: Textures, land: Land, air: Atmosphere) -> None:
    """Water from the row `land.water` down: the mirrored picture, broken by waves, and a path of glitter."""
    first = round(land.water * frame.size)
    rows = frame.size - first
    depth = frame.at[:rows, None]
    left = land.window[1] * frame.size // OFFSETS
    waves = tables.waves[:rows, left : left + frame.size]
    # Waves tilt the mirror up and down, the more the nearer they are.
    # Foreshortened, so that islands do not hang above their own image and the sky is never used up.
    height = np.float32(land.water) * (1.0 - np.exp(depth * np.float32(-1.6 / land.water)))
    mirror = first - (height + waves * (0.006 + 0.12 * depth)) * np.float32(frame.size)
    row = np.clip(mirror, 0, first - 1).astype(np.intp)
    place = row * frame.size + np.arange(frame.size)
    calm = canvas.reshape(3, -1).take(place, axis=1)
    body = air.ambient * colour("5a98ac") + air.key * colour("1c4a62") * np.float32(1.0 + 0.3 * land.hue)
    clear = np.maximum(0.78 - depth * 1.1, 0.25)
    water = calm * clear + body[:, None, None] * (1.0 - clear)
    water *= 1.0 + waves * np.minimum(0.03 + depth * 0.35, 0.12)
    path = np.exp(-(((frame.at - np.float32(air.x)) / (np.float32(air.radius * 1.1) + 0.3 * depth)) ** 2))
    path *= _unit(0.45 + 0.45 * waves) * np.minimum(1.15 - depth * 1.3, 0.9)
    water += path * (air.glow[:, None, None] - water)
    canvas[:, first:] = water


# ------------------------------------------------------------------------------------------- picture


def render(scene: Scene, resolution: int = 64) -> np.ndarray:
    """The picture of `scene`, uint8 [H W 3] RGB with H = W = `resolution`.

    The same scene at a larger resolution is the same picture, finer. Deterministic: equal arguments give
    equal bytes. Raises ValueError where `resolution` is not a power of two from 32 up.
    """
    if resolution < 32 or resolution & (resolution - 1):
        raise ValueError(
            f"render: resolution {resolution} is not a power of two from 32 up; take 64, 128, 256 ..."
        )
    frame, tables = frame_of(resolution), textures(resolution)
    land = land_of(scene, frame, tables)
    skyline = np.full(resolution, min(land.water, 1.0), np.float32)
    for ridge in land.ridges:
        skyline = np.minimum(skyline, ridge.top)
    air = atmosphere(scene, skyline)
    draw = scene.draws(Purpose.SKY)
    rows = min(int(float(skyline.max()) * resolution) + 2, resolution)
    canvas = np.empty((3, resolution, resolution), np.float32)
    canvas[:, rows:] = air.haze[:, None, None]
    _paint_sky(canvas, frame, air, scene, land.horizon, rows)
    veil = None
    if scene.sky is Sky.CLOUDY:
        veil = _paint_clouds(canvas, frame, tables, air, draw, land.horizon, rows)
    elif scene.time is Time.NIGHT:
        _paint_stars(canvas, frame, tables, air, draw, rows)
    _PAINT[scene.terrain](canvas, frame, tables, land, air)
    if land.water < 1.0:
        _paint_water(canvas, frame, tables, land, air)
    _paint_disc(canvas, frame, tables, air, skyline, veil, scene.time is Time.NIGHT)
    bloom = _bell(frame.at, air.y, 0.16)[:, None] * (
        _bell(frame.at, air.x, 0.18) * np.float32(0.2 if veil is None else 0.28)
    )
    canvas += bloom * (air.glow[:, None, None] - canvas)
    np.clip(canvas, 0, 1, out=canvas)
    return np.ascontiguousarray(
        (canvas * np.float32(255) + np.float32(0.5)).astype(np.uint8).transpose(1, 2, 0)
    )
