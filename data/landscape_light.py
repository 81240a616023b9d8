"""The light of a procedural landscape: where sun or moon stand, and every colour that follows from the hour.

Each hour has a few palettes painted by hand; a scene mixes two of them and shifts the result a little, so
that no two dawns are alike and yet none is mistaken for a sunset. All colours are display RGB in [0, 1].

Used by `data.landscape_painter`: `atmosphere(scene, skyline)` returns all of it for one scene.
"""

from dataclasses import dataclass

import numpy as np

from data.landscape_scenes import Draws, Light, Purpose, Scene, Sky, Time

Array = np.ndarray


def colour(code: str) -> Array:
    """The colour float32 [3] in [0, 1] of a hex code such as "f8e0c0"."""
    return np.array([int(code[i : i + 2], 16) for i in (0, 2, 4)], np.float32) / np.float32(255)


def _palette(codes: str) -> Array:
    return np.stack([colour(code) for code in codes.split()])


# Rows: zenith, upper, lower, horizon; glow around the disc; key light on the land; ambient light; lit and
# shaded cloud. Key and ambient multiply the land's own colour.
_SKIES: dict[Time, tuple[Array, ...]] = {
    Time.DAWN: (
        _palette("6f87b8 a9a8cf e6bfc6 f8e0c0 ffdf9e ecc4aa 7c7ca4 f9dcd2 9a93bb"),
        _palette("7a9cc6 b0b9de f0c9cf fbe6cf ffe6b4 e8c8b4 808cae fae3de a3a4c6"),
        _palette("8a8fc4 c0b0d6 f3c5c8 fde3c8 ffd898 eebcA4 867ca8 ffdccf a093bf"),
        _palette("6486b4 9fb3d1 d6c8d8 f5dcd0 ffe0ac e4c4b6 7688a6 f4dcd8 93a0c0"),
    ),
    Time.NOON: (
        _palette("1f6fcf 4c9be6 8cc4f2 cfe8f8 ffffff c9c2b0 7c90a8 ffffff a9bdd2"),
        _palette("2a80d8 5eaaea 9bd0f4 d8edf7 ffffff c8c2b2 8094aa ffffff b2c3d4"),
        _palette("1a5fb8 3f8cd8 80bbec c4e2f5 ffffff ccc4ae 768caa fdfeff a0b4cc"),
        _palette("2b86c5 58acd8 96cbe6 d6ecf0 ffffff c6c4b4 7e94a2 ffffff adc0cc"),
    ),
    Time.SUNSET: (
        _palette("2b2a5e 7a3b78 d9534f ff9a3c ffc04a ff9452 40365a ff8d52 5a3560"),
        _palette("3a2457 9a3566 ee6a3d ffb347 ffd060 ff984c 463252 ff9a58 6b3058"),
        _palette("222c60 5d3f7f c65a6a ff8c42 ffb84e fb8c56 3c385e f98a62 4e3868"),
        _palette("4a2a50 b0413e f07f2f ffc14d ffdc70 ffa048 4a3448 ffa04a 70344c"),
    ),
    Time.NIGHT: (
        _palette("050a1e 0b1636 162a52 28406c 9fb4e0 5f78a8 141d38 6f82a8 1d2745"),
        _palette("070b26 121a46 20305f 384c7c a8b8ec 6678ac 171d40 7884b0 232a50"),
        _palette("03101f 08203c 123655 235070 9cc4e0 5884a8 102338 6488a4 16304a"),
        _palette("0a0a24 1a1842 2c2a5c 424272 b4b0e8 6c70a8 1a1a3e 8080ac 28284e"),
    ),
}
_DISC = {Time.DAWN: "fffbea", Time.NOON: "ffffff", Time.SUNSET: "fff6c0", Time.NIGHT: "f6f4e4"}
_RADIUS = {
    Time.DAWN: (0.034, 0.048),
    Time.NOON: (0.034, 0.044),
    Time.SUNSET: (0.046, 0.072),
    Time.NIGHT: (0.036, 0.058),
}
_SIDE = {Light.LEFT: (0.12, 0.30), Light.CENTRE: (0.43, 0.57), Light.RIGHT: (0.70, 0.88)}
_CONTRAST = {Time.DAWN: 0.75, Time.NOON: 0.8, Time.SUNSET: 1.0, Time.NIGHT: 0.85}


@dataclass(frozen=True)
class Atmosphere:
    """Returns the light of one scene: the disc (picture widths, y down), and colours float32 [3] in [0, 1].

    `sky` [4 3] runs from the zenith to the horizon; `contrast` scales the difference of lit and shaded sides.
    """

    x: float
    y: float
    radius: float
    phase: float
    sky: Array
    glow: Array
    key: Array
    ambient: Array
    cloud_lit: Array
    cloud_shade: Array
    disc: Array
    haze: Array
    contrast: float
    mist: float


def _mixed(scene: Scene, draw: Draws) -> Array:
    options = _SKIES[scene.time]
    first, second = draw.choose(options), draw.choose(options)
    mixed = first + np.float32(draw.between(0.0, 1.0)) * (second - first)
    tint = np.array([draw.between(-1.0, 1.0) for _ in range(3)], np.float32)
    exposure = draw.between(0.93, 1.07)
    return mixed * (np.float32(exposure) * (1.0 + np.float32(0.035) * (tint - tint.mean())))


def _height(scene: Scene, draw: Draws, x: float, radius: float, skyline: Array) -> float:
    """The height of the disc's centre; a low one stands on the skyline, none is ever hidden behind it."""
    span = skyline.size
    left, right = int(max(x - radius, 0.0) * span), int(min(x + radius, 1.0) * span) + 1
    ridge = float(skyline[left:right].min())
    lift = draw.between(0.0, 1.0)
    if scene.time is Time.NOON:
        wanted = 0.09 + 0.09 * lift
    elif scene.time is Time.NIGHT:
        wanted = 0.10 + 0.17 * lift
    else:
        wanted = ridge - radius * (0.1 + 2.6 * lift)
    return max(min(wanted, ridge - 0.3 * radius), radius)


def atmosphere(scene: Scene, skyline: Array) -> Atmosphere:
    """The light of `scene` over the `skyline` float32 [W], the height (y down) of its opaque edge."""
    draw = scene.draws(Purpose.LIGHT)
    colours = _mixed(scene, draw)
    low, high = _RADIUS[scene.time]
    radius = draw.between(low, high)
    x = draw.between(*_SIDE[scene.light])
    y = _height(scene, draw, x, radius, skyline)
    sky, glow, key, ambient, lit, shade = colours[:4], *colours[4:]
    contrast, mist = _CONTRAST[scene.time], draw.between(0.0, 1.0)
    phase = draw.between(-1.0, 1.0)
    if scene.sky is Sky.CLOUDY:
        grey = sky.mean(axis=1, keepdims=True)
        sky = sky + np.float32(0.22) * (grey - sky)
        key, contrast = key * np.float32(0.86), contrast * 0.7
    haze = sky[3] + np.float32(0.35) * (sky[2] - sky[3])
    mist = 0.35 + 0.5 * mist if scene.time is Time.DAWN else 0.22 * mist
    disc = colour(_DISC[scene.time])
    return Atmosphere(x, y, radius, phase, sky, glow, key, ambient, lit, shade, disc, haze, contrast, mist)
