"""The sentence that describes a procedural landscape: many patterns, synonyms and word orders, one meaning.

Every caption states all four factors, and no word of it speaks for another class than the scene's own: stars
are mentioned only where the sky is clear, a rising sun only at dawn. Patterns are filled with phrases drawn
by the scene's own counter.

Used through `data.landscapes.caption`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from data.landscape_scenes import Light, Purpose, Scene, Sky, Terrain, Time

T = TypeVar("T")

# Fields: when "at dawn"; hour "dawn"; land "rolling hills"; view "desert landscape"; disc "the sun"; side
# "on the left"; half "left"; sky "a clear sky"; look "clear".
PATTERNS = (
    "{land} {when}, {disc} {side}, {sky}",
    "{land} {when} under {sky}, {disc} {side}",
    "{when}, {land} under {sky} with {disc} {side}",
    "a {look} {hour} over {land}, {disc} {side}",
    "{land}, {hour}, {look}, {disc} {side}",
    "{disc} {side} over {land} {when}, {sky}",
    "{sky} above {land} {when}, {disc} {side}",
    "a picture of {land} {when} with {disc} {side} and {sky}",
    "a painting of {land} {when}, {disc} {side}, {sky}",
    "a view of {land} {when}: {sky}, {disc} {side}",
    "{side}, {disc}; {land} {when} under {sky}",
    "{hour}: {land}, {sky}, {disc} {side}",
    "it is {hour} over {land}, the sky is {look} and {disc} is {side}",
    "looking out over {land} {when}; {disc} {side}, the sky {look}",
    "{land} seen {when}, with {sky} and {disc} {side}",
    "{disc} {side}, {sky}, {land} {when}",
    "{sky}, {disc} {side}, {land} {when}",
    "{when} the sky is {look} over {land}, {disc} {side}",
    "{land} with {disc} {side}, {when}, {look}",
    "{land} {when}, {look}, {disc} {side}",
    "{look} sky, {disc} {side}, {land} {when}",
    "a {hour} {view}, {look}, {disc} {side}",
    "a {look} {view} {when}, {disc} {side}",
    "a {view} {when} with {disc} {side} under {sky}",
    "{view} {when}, {sky}, {disc} {side}",
    "{disc} shines {side} over {land} {when}, {sky}",
    "{disc} hangs {side} above {land} {when} in {sky}",
    "{land} {when} and {disc} {side} in {sky}",
    "a quiet {hour} with {land} under {sky}, {disc} {side}",
    "{disc} lights {land} from the {half} {when}, {sky}",
    "{land} lit by {disc} {side}, {when}, under {sky}",
    "under {sky}, {land} {when}, {disc} {side}",
    "beneath {sky}, {land} {when} with {disc} {side}",
    "{hour} over {land}, {disc} {side}, {sky}",
    "a {hour} scene: {land}, {disc} {side}, {sky}",
    "{disc} {side}, {land} below, a {look} {hour}",
    "landscape with {land}, {disc} {side}, {sky}, {when}",
    "a photo of {land} {when}, {look}, {disc} {side}",
    "{land} {when}; {disc} {side}; {sky}",
    "{when}: {land}, {disc} {side}, the sky {look}",
    "the sky {look}, {disc} {side}, {land} {when}",
    "{disc} {side} and {sky} over {land} {when}",
    "{land} on a {look} {hour}, {disc} {side}",
    "{land} {when}, the sky {look}, {disc} standing {side}",
    "with {disc} {side} and {sky}, {land} {when}",
    "{hour}, {land}, {disc} {side}, {look}",
    "{look} {hour}, {land}, {disc} {side}",
    "a wide {view}, {hour}, {sky}, {disc} {side}",
)

_WHEN = {
    Time.DAWN: ("at dawn", "at daybreak", "at sunrise", "at first light", "in the early morning"),
    Time.NOON: ("at noon", "at midday", "at high noon", "in broad daylight at noon"),
    Time.SUNSET: ("at sunset", "at dusk", "at sundown", "in the evening glow"),
    Time.NIGHT: ("at night", "by night", "at midnight", "by moonlight"),
}
_HOUR = {
    Time.DAWN: ("dawn", "dawn", "daybreak", "sunrise"),
    Time.NOON: ("noon", "midday"),
    Time.SUNSET: ("sunset", "sunset", "dusk", "sundown"),
    Time.NIGHT: ("night", "night", "moonlit night"),
}
_LAND = {
    Terrain.MOUNTAINS: ("mountains", "snowy mountains", "mountain peaks", "a mountain range", "alpine peaks"),
    Terrain.HILLS: ("hills", "rolling hills", "green hills", "grassy hills", "gentle hills"),
    Terrain.DESERT: ("a desert", "the desert", "desert dunes", "sand dunes", "a sandy desert"),
    Terrain.SEA: ("the sea", "the open sea", "the ocean", "a wide sea", "a calm ocean"),
}
_VIEW = {
    Terrain.MOUNTAINS: ("mountain landscape", "mountain scene", "mountain view"),
    Terrain.HILLS: ("hill landscape", "hilly landscape", "view of rolling hills"),
    Terrain.DESERT: ("desert landscape", "desert scene", "view of sand dunes"),
    Terrain.SEA: ("seascape", "sea view", "ocean scene"),
}
_DISC = {
    Time.DAWN: ("the sun", "the rising sun", "the morning sun", "a pale sun", "the sun low"),
    Time.NOON: ("the sun", "the midday sun", "the noon sun", "a high sun", "the sun high"),
    Time.SUNSET: ("the sun", "the setting sun", "the evening sun", "a red sun", "the sun low"),
    Time.NIGHT: ("the moon", "a bright moon", "a pale moon", "the shining moon", "the moon high"),
}
_SIDE = {
    Light.LEFT: ("on the left", "to the left", "at the left", "on the left side", "on the left-hand side"),
    Light.CENTRE: ("in the centre", "in the middle", "in the center", "at the centre", "straight ahead"),
    Light.RIGHT: (
        "on the right",
        "to the right",
        "at the right",
        "on the right side",
        "on the right-hand side",
    ),
}
_HALF = {Light.LEFT: "left", Light.CENTRE: "centre", Light.RIGHT: "right"}
_SKY = {
    Sky.CLEAR: ("a clear sky", "clear skies", "a cloudless sky", "unclouded skies"),
    Sky.CLOUDY: (
        "a cloudy sky",
        "cloudy skies",
        "an overcast sky",
        "drifting clouds",
        "a sky full of clouds",
    ),
}
_STARRY = ("a starry sky", "a clear, starry sky", *_SKY[Sky.CLEAR][:3])
_LOOK = {Sky.CLEAR: ("clear", "clear", "cloudless"), Sky.CLOUDY: ("cloudy", "cloudy", "overcast")}

ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou])")


def caption(scene: Scene) -> str:
    """A sentence in English that states the four factors of `scene`; always the same one for a scene."""
    draw = scene.draws(Purpose.CAPTION)
    pattern = draw.choose(PATTERNS)
    starry = scene.sky is Sky.CLEAR and scene.time is Time.NIGHT
    text = pattern.format(
        when=draw.choose(_WHEN[scene.time]),
        hour=draw.choose(_HOUR[scene.time]),
        land=draw.choose(_LAND[scene.terrain]),
        view=draw.choose(_VIEW[scene.terrain]),
        disc=draw.choose(_DISC[scene.time]),
        side=draw.choose(_SIDE[scene.light]),
        half=_HALF[scene.light],
        sky=draw.choose(_STARRY if starry else _SKY[scene.sky]),
        look=draw.choose(_LOOK[scene.sky]),
    )
    text = ARTICLE.sub(r"\1n ", text)
    if draw.chance(0.4):
        text = text[0].upper() + text[1:]
        if draw.chance(0.6):
            text += "."
    return text


def _unique(*tables: Mapping[T, Sequence[str]]) -> dict[T, re.Pattern[str]]:
    """Class -> what finds its own phrases in a text: those of `tables` that no other class has."""
    phrases: dict[T, set[str]] = {
        each: {_LEADING.sub("", phrase) for table in tables for phrase in table[each]} for each in tables[0]
    }
    own = {
        each: sorted(words - set().union(*(phrases[other] for other in phrases if other is not each)))
        for each, words in phrases.items()
    }
    return {each: re.compile(rf"\b(?:{'|'.join(words)})\b", re.IGNORECASE) for each, words in own.items()}


_LEADING = re.compile(r"^(?:an?|the) ")
_SPOKEN: dict[str, Mapping[Any, re.Pattern[str]]] = {
    "time": _unique(_WHEN, _HOUR, _DISC),
    "terrain": _unique(_LAND, _VIEW),
    "light": _unique(_SIDE, {light: (half,) for light, half in _HALF.items()}),
    "sky": _unique(_SKY, _LOOK, {Sky.CLEAR: ("starry",), Sky.CLOUDY: ("clouds",)}),
}


def read_factors(text: str) -> dict[str, str]:
    """The factors that `text` states, as `data.landscapes.factors` gives them: the inverse of `caption`.

    All four for a caption; for a sentence in other words those that it names by a phrase of the captions.
    A factor of which it names two classes is left out.
    """
    found = {
        factor: [each.value for each, phrases in classes.items() if phrases.search(text)]
        for factor, classes in _SPOKEN.items()
    }
    return {factor: named[0] for factor, named in found.items() if len(named) == 1}
