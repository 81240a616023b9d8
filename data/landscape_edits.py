"""Edits of procedural landscapes: a scene, the same scene with one factor changed, and words that ask for it.

Edit `index` of seed `seed` is a pure function of the two, and its scene before is `draw_scene(seed, index)`.
Exactly one of the four factors differs; geometry, clouds and light read their own blocks of draws, so all
else is the same place, pixel for pixel where the changed factor does not reach. The instruction names the
factor's new value and nothing else: no other factor, and neither sun nor moon where that would tell the hour
or be wrong at it.

    edit = draw_edit(seed=0, index=42)
    render(edit.before, 64), render(edit.after, 64), edit.instruction
    write_landscape_edits(Path("shards/edits/train"), count=16_384, resolution=64, seed=1, workers=2)
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

import numpy as np

from data.landscape_captions import ARTICLE
from data.landscape_scenes import Draws
from data.landscapes import (
    FACTORS,
    LANDSCAPES_VERSION,
    Light,
    Scene,
    Sky,
    Terrain,
    Time,
    draw_scene,
    factors,
    jpeg,
)  # fmt: skip
from data.rendering import RenderPlan, render_as_told, write_rendered

#: Grows whenever the same (seed, index) would give another pair or instruction.
EDITS_VERSION = 100 * LANDSCAPES_VERSION + 1
#: The counter of an edit's own draws begins here, far above those of its scene.
_COUNTER = 2**64
_DRAWS = 8

# Fields: hour "night"; when "at night"; land "a desert"; side "on the left"; way "to the left"; light "the
# sun".
_TIME = (
    "make it {hour}", "turn it into {hour}", "change the time to {hour}", "set it {when}",
    "make this a {hour} scene", "the same place {when}", "show the scene {when}", "let it be {hour}",
    "change it to {hour}", "make the time of day {hour}", "it should be {hour}",
    "what would it look like {when}", "now {when}", "switch to {hour}", "move the hour to {hour}",
    "paint it {when}",
)  # fmt: skip
_TERRAIN = (
    "turn this into {land}", "make it {land}", "replace the land with {land}", "change the terrain to {land}",
    "put {land} here instead", "change the landscape to {land}", "swap the ground for {land}",
    "show {land} instead", "make the place {land}", "let there be {land}", "it should be {land}",
    "turn the land into {land}", "transform the terrain into {land}", "set the scene in {land}",
    "have {land} instead", "make this {land}",
)  # fmt: skip
_LIGHT = (
    "move {light} {way}", "put {light} {side}", "shift {light} {way}", "place {light} {side}",
    "{light} should be {side}", "let {light} stand {side}", "position {light} {side}", "have {light} {side}",
    "bring {light} {way}", "with {light} {side}", "{light} {side}", "make {light} stand {side}",
    "change the side: {light} {side}", "drag {light} {way}", "let {light} shine {side}", "push {light} {way}",
)  # fmt: skip
_SKIES = {
    Sky.CLEAR: (
        "clear the sky", "remove the clouds", "take away the clouds", "make the sky clear", "a clear sky",
        "no clouds, please", "make it cloudless", "blow the clouds away", "the sky should be clear",
        "make the weather clear", "get rid of the clouds", "erase all clouds", "show a cloudless sky",
        "let the clouds go", "without clouds", "make the sky empty of clouds",
    ),
    Sky.CLOUDY: (
        "make it cloudy", "add clouds", "cover the sky with clouds", "make the sky cloudy", "a cloudy sky",
        "put clouds in the sky", "more clouds, please", "make it overcast", "fill the sky with clouds",
        "the sky should be cloudy", "let clouds come in", "bring in some clouds", "show an overcast sky",
        "paint clouds into the sky", "with clouds", "make the weather cloudy",
    ),
}  # fmt: skip
_HOUR = {
    Time.DAWN: ("dawn", "daybreak", "sunrise", "early morning"),
    Time.NOON: ("noon", "midday", "high noon"),
    Time.SUNSET: ("sunset", "dusk", "sundown", "evening"),
    Time.NIGHT: ("night", "midnight", "night time"),
}
_WHEN = {
    Time.DAWN: ("at dawn", "at daybreak", "at sunrise", "in the early morning"),
    Time.NOON: ("at noon", "at midday", "at high noon"),
    Time.SUNSET: ("at sunset", "at dusk", "at sundown", "in the evening"),
    Time.NIGHT: ("at night", "by night", "at midnight"),
}
_LAND = {
    Terrain.MOUNTAINS: ("mountains", "snowy mountains", "a mountain range", "high peaks"),
    Terrain.HILLS: ("hills", "rolling hills", "green hills", "gentle hills"),
    Terrain.DESERT: ("a desert", "sand dunes", "desert dunes", "a sandy desert"),
    Terrain.SEA: ("the sea", "the open sea", "an ocean", "a wide sea"),
}
_SIDE = {
    Light.LEFT: ("on the left", "at the left", "on the left side", "on the left-hand side"),
    Light.CENTRE: ("in the centre", "in the middle", "in the center", "at the centre"),
    Light.RIGHT: ("on the right", "at the right", "on the right side", "on the right-hand side"),
}
_WAY = {
    Light.LEFT: ("to the left", "to the left side", "left", "over to the left"),
    Light.CENTRE: ("to the centre", "to the middle", "to the center", "into the middle"),
    Light.RIGHT: ("to the right", "to the right side", "right", "over to the right"),
}
_NEUTRAL = "the light"
PATTERNS = {"time": _TIME, "terrain": _TERRAIN, "light": _LIGHT}


@dataclass(frozen=True)
class Edit:
    """One edit: two scenes that differ in `factor` alone, and the words that ask for the second."""

    before: Scene
    after: Scene
    factor: str
    instruction: str


def draw_edit(seed: int, index: int) -> Edit:
    """The edit at `index` of the endless sequence `seed`: factor and new value uniform among the others.

    A pure function of its arguments. Raises ValueError for a negative seed or index.
    """
    before = draw_scene(seed, index)
    draw = _draws(seed, index)
    factor = draw.choose(tuple(FACTORS))
    old = FACTORS[factor](factors(before)[factor])
    value = draw.choose([member for member in FACTORS[factor] if member is not old])
    return Edit(before, _changed(before, factor, value), factor, _instruction(before, factor, value, draw))


def _changed(scene: Scene, factor: str, value: Enum) -> Scene:
    changes: dict[str, Enum] = {factor: value}
    return replace(scene, **changes)  # type: ignore[arg-type]  # the factors' names are the fields'


def _draws(seed: int, index: int) -> Draws:
    key = np.array([seed, index], dtype=np.uint64)
    # Philox counts from here on; the scene's numbers begin at counter 0.
    return Draws(np.random.Generator(np.random.Philox(key=key, counter=_COUNTER)).random(_DRAWS).tolist())


def _instruction(scene: Scene, factor: str, value: Enum, draw: Draws) -> str:
    """A sentence that asks for `value`; of the scene it knows whether sun or moon shines, else nothing."""
    if isinstance(value, Sky):
        text = draw.choose(_SKIES[value])
    elif isinstance(value, Light):
        disc = "the moon" if scene.time is Time.NIGHT else "the sun"
        text = draw.choose(_LIGHT).format(
            side=draw.choose(_SIDE[value]),
            way=draw.choose(_WAY[value]),
            light=draw.choose((_NEUTRAL, disc, disc)),
        )
    elif isinstance(value, Terrain):
        text = draw.choose(_TERRAIN).format(land=draw.choose(_LAND[value]))
    else:
        assert isinstance(value, Time)
        hour, when = draw.choose(_HOUR[value]), draw.choose(_WHEN[value])
        text = draw.choose(_TIME).format(hour=hour, when=when)
    text = ARTICLE.sub(r"\1n ", text)
    return text[0].upper() + text[1:] if draw.chance(0.4) else text


def encode_edit(edit: Edit, resolution: int) -> tuple[str, dict[str, bytes]]:
    """The key and the fields before.jpg, jpg (after), txt (the instruction) and json, for `write_shard`.

    The record holds the four factors after the edit, those before it under `before`, and the `factor`.
    """
    scene = edit.after
    record = {
        **factors(scene),
        "before": factors(edit.before),
        "factor": edit.factor,
        "seed": scene.seed,
        "index": scene.index,
        "width": resolution,
        "height": resolution,
    }
    return f"edit-{scene.index:08d}", {
        "before.jpg": jpeg(edit.before, resolution),
        "jpg": jpeg(scene, resolution),
        "txt": edit.instruction.encode(),
        "json": json.dumps(record).encode(),
    }


def _sample(seed: int, index: int, resolution: int) -> tuple[str, dict[str, bytes]]:
    return encode_edit(draw_edit(seed, index), resolution)


def write_landscape_edits(
    folder: Path,
    count: int,
    resolution: int,
    seed: int,
    shard_size: int = 1024,
    workers: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """The shards `000000.tar` ... written to `folder`: edits 0 to `count` - 1 of `seed`, WebDataset layout.

    Each sample is `edit-<index>` with the fields of `encode_edit`. Everything else, errors included, is as
    in `data.landscapes.write_landscapes`.
    """
    plan = RenderPlan("landscape_edits", EDITS_VERSION, seed, resolution, shard_size)
    return write_rendered(folder, _sample, plan, count, workers, progress)


if __name__ == "__main__":
    render_as_told(_sample)
