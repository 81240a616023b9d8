"""Noise for the procedural landscapes: long ridge lines and tileable textures, made once per resolution.

A picture of the embedded data set is drawn in about a millisecond, so nothing in it may compute noise: it
cuts windows out of tables made here. Every table is a sum of octaves of one fixed lattice of random numbers,
evaluated at pixel centres; a larger resolution samples the same functions more finely and adds only the
octaves that a smaller one could not hold, so a scene is the same picture at every resolution.

Used by `data.landscape_painter` alone: `textures(resolution)` returns the cached set.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

SCREENS = 64  # length of the ridge tables, in picture widths
TILE = 2  # side of the textures, in picture widths
OFFSETS = 64  # windows start at multiples of 1/OFFSETS, so they fall on pixels at every resolution from 64 up
_LATTICE = 512

Array = np.ndarray


@lru_cache(maxsize=1)
def _lattice() -> Array:
    """The random lattice [512 512] in [-1, 1] behind every table."""
    return np.random.Generator(np.random.Philox(key=0x1A4D)).uniform(-1.0, 1.0, (_LATTICE, _LATTICE))


def _smooth(fraction: Array) -> Array:
    """The quintic step of Perlin 2002 ("Improving noise"): no visible creases at lattice lines."""
    return fraction**3 * (fraction * (fraction * 6.0 - 15.0) + 10.0)


def _noise_1d(u: Array, period: int, salt: int, sharp: bool) -> Array:
    """Value noise in [-1, 1] at `u` (lattice cells); straight between lattice points where `sharp`."""
    cell = np.floor(u).astype(np.int64)
    blend = u - cell
    if not sharp:
        blend = _smooth(blend)
    values = _lattice().reshape(-1)
    shift = salt * 7919
    low, high = (values[((cell + step) % period + shift) % values.size] for step in (0, 1))
    return low + (high - low) * blend


def _noise_2d(v: Array, u: Array, salt: int) -> Array:
    """Value noise in [-1, 1] at rows `v` and columns `u` (lattice cells, broadcast)."""
    lattice = np.roll(_lattice(), (salt * 37, salt * 61), (0, 1))
    v, u = np.broadcast_arrays(v, u)
    row, column = np.floor(v).astype(np.int64), np.floor(u).astype(np.int64)
    down, right = _smooth(v - row), _smooth(u - column)
    rows = row % _LATTICE, (row + 1) % _LATTICE
    columns = column % _LATTICE, (column + 1) % _LATTICE
    top = lattice[rows[0], columns[0]] * (1.0 - right) + lattice[rows[0], columns[1]] * right
    bottom = lattice[rows[1], columns[0]] * (1.0 - right) + lattice[rows[1], columns[1]] * right
    return top + (bottom - top) * down


def _unit(table: Array) -> Array:
    """`table` with mean 0 and standard deviation 1, float32."""
    return ((table - table.mean()) / table.std()).astype(np.float32)


def _range(table: Array) -> Array:
    """`table` scaled so that nearly all of it lies in [0, 1], float32."""
    low, high = np.percentile(table, (1.0, 99.0))
    return ((table - low) / (high - low)).astype(np.float32)


def _line(resolution: int, cells: int, octaves: int, gain: float, salt: int, sharp: bool) -> Array:
    """A periodic sum of octaves [SCREENS * resolution]; `cells` per picture width in the first octave."""
    x = (np.arange(SCREENS * resolution) + 0.5) / resolution
    total = np.zeros_like(x)
    for octave in range(octaves):
        frequency = cells * 2**octave
        if octave > 0 and frequency > resolution // 2:
            break
        period = SCREENS * frequency
        total += gain**octave * _noise_1d(x * frequency, period, salt + octave, sharp)
    return total


def _tile(resolution: int, cells: tuple[float, float], slope: float, salt: int) -> Array:
    """Tileable noise [TILE * resolution, TILE * resolution] without a lattice's squares, mean 0, deviation 1.

    White noise filtered in the frequency domain: amplitude falls as frequency to the power -`slope` from
    `cells` (rows, columns) cycles per tile on. A larger tile takes more of the same spectrum.
    """
    size = TILE * resolution
    rng = np.random.Generator(np.random.Philox(key=0x71E0 + salt))
    whole = np.fft.rfft2(rng.standard_normal((_LATTICE, _LATTICE)))
    kept = min(size, _LATTICE) // 2 - 1
    spectrum = np.zeros((size, size // 2 + 1), np.complex128)
    spectrum[: kept + 1, : kept + 1] = whole[: kept + 1, : kept + 1]
    spectrum[-kept:, : kept + 1] = whole[-kept:, : kept + 1]
    rows, columns = np.fft.fftfreq(size, 1 / size)[:, None] / cells[0], np.arange(size // 2 + 1) / cells[1]
    radius = np.sqrt(rows**2 + columns**2)
    spectrum *= radius**2 / (1.0 + radius ** (2.0 + slope))
    return _unit(np.fft.irfft2(spectrum, s=(size, size)))


def _rock(resolution: int) -> Array:
    """Light and shade of gullied rock lit from the right: the slope of a folded tile."""
    step = max(resolution // 64, 1)
    folds = -np.abs(_tile(resolution, (5.0, 9.0), 1.9, 7))
    return _unit(np.clip(_unit(np.roll(folds, -step, 1) - np.roll(folds, step, 1)), -2.5, 2.5))


def _dunes(resolution: int) -> Array:
    """A line [SCREENS * resolution] of leaning crests with smooth troughs between."""
    x = (np.arange(SCREENS * resolution) + 0.5) / resolution * 2
    lean = 0.3 * _noise_1d(x, SCREENS * 2, 41, sharp=False)
    crests = 1.0 - np.abs(_noise_1d(x + lean, SCREENS * 2, 40, sharp=False)) ** 1.1
    return crests + 0.12 * _line(resolution, 3, 2, 0.4, 50, sharp=False)


def _waves(resolution: int) -> Array:
    """Waves in perspective [R TILE * R]: row 0 at the horizon; mean 0, deviation 1 a row."""
    y = ((np.arange(resolution) + 0.5) / resolution)[:, None]
    x = (np.arange(TILE * resolution) + 0.5) / resolution - TILE / 2
    total = np.zeros((resolution, TILE * resolution))
    for octave in range(1 + resolution.bit_length() - 6):
        length = (0.05 + 0.55 * y) / 2**octave
        rows = np.log(y + 0.02) * 11.0 * 2**octave + 300.0
        total += 0.6**octave * _noise_2d(rows, x / length + 200.0, 3 + octave)
    total -= total.mean(axis=1, keepdims=True)
    return (total / total.std(axis=1, keepdims=True)).astype(np.float32)


def _stars(resolution: int) -> Array:
    """Stars [TILE * resolution, TILE * resolution] in [0, 1]: soft points, each about one pixel of 64."""
    size = TILE * resolution
    rng = np.random.Generator(np.random.Philox(key=0x57A5))
    count = 360
    rows, columns = rng.random(count) * TILE, rng.random(count) * TILE
    brightness = rng.random(count) ** 2.2 * 0.85 + 0.15
    radius = max(0.5 / resolution, 0.0042)
    at = (np.arange(size) + 0.5) / resolution
    sky = np.zeros((size, size))
    for row, column, bright in zip(rows, columns, brightness, strict=True):
        fall_y = np.exp(-(((at - row) / radius) ** 2))
        fall_x = np.exp(-(((at - column) / radius) ** 2))
        ys, xs = np.flatnonzero(fall_y > 1e-3), np.flatnonzero(fall_x > 1e-3)
        sky[np.ix_(ys, xs)] += bright * fall_y[ys, None] * fall_x[xs]
    return np.minimum(sky * 1.3, 1.0).astype(np.float32)


@dataclass(frozen=True)
class Textures:
    """Returns, by name, the tables of one resolution: lines [SCREENS * R] in about [0, 1], tiles [TILE*R
    TILE*R].

    `cumulus`, `stratus`, `relief`, `rock`, `swirl`, `clumps` have mean 0 and deviation 1; `stars` lies in
    [0, 1]; `waves` is [R TILE*R] with the horizon in row 0.
    """

    crags: Array
    massif: Array
    downs: Array
    dunes: Array
    firs: Array
    crowns: Array
    cumulus: Array
    stratus: Array
    relief: Array
    rock: Array
    swirl: Array
    clumps: Array
    stars: Array
    waves: Array


@lru_cache(maxsize=4)
def textures(resolution: int) -> Textures:
    """The tables for pictures of `resolution` pixels a side, a power of two from 32 up; about 0.1 s at 64."""
    crags = _line(resolution, 3, 9, 0.47, 1, sharp=True)
    return Textures(
        crags=_range(crags),
        massif=_range(_line(resolution, 3, 3, 0.47, 1, sharp=True)),
        downs=_range(_line(resolution, 2, 3, 0.32, 20, sharp=False)),
        dunes=_range(_dunes(resolution)),
        firs=_range(np.abs(_line(resolution, 30, 2, 0.6, 60, sharp=True))),
        crowns=_range(np.sqrt(np.abs(_line(resolution, 20, 2, 0.5, 70, sharp=False)))),
        cumulus=_tile(resolution, (6.0, 3.6), 1.9, 1),
        stratus=_tile(resolution, (16.0, 3.0), 1.9, 2),
        relief=_tile(resolution, (9.0, 9.0), 1.7, 3),
        rock=_rock(resolution),
        swirl=_tile(resolution, (7.0, 5.0), 3.0, 4),
        clumps=_tile(resolution, (26.0, 11.0), 1.6, 5),
        stars=_stars(resolution),
        waves=_waves(resolution),
    )
