"""The procedural landscapes: exact draws, readable pictures, unambiguous captions, reproducible shards."""

import dataclasses
import io
import itertools
import json
import re
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data import rendering
from data.landscape_geometry import frame_of, land_of
from data.landscape_noise import textures
from data.landscapes import (
    FACTORS,
    PATTERNS,
    Light,
    Sky,
    Time,
    caption,
    draw_scene,
    encode,
    factors,
    read_factors,
    render,
    write_landscapes,
)
from data.shard_index import DataError

PROJECT = Path(__file__).resolve().parents[2]

# What a reader may take each word for. A caption must speak for exactly one class of every factor.
WORDS = {
    "time": {
        "dawn": "dawn|daybreak|sunrise|first light|morning|rising",
        "noon": "noon|midday|daylight",
        "sunset": "sunset|dusk|sundown|evening|setting|red sun",
        "night": "night|midnight|moonlight|moonlit|moon|starry",
    },
    "terrain": {
        "mountains": "mountains?|alpine|peaks|snowy",
        "hills": "hills?|hilly|grassy",
        "desert": "desert|dunes|sand|sandy",
        "sea": "sea|ocean|seascape",
    },
    "light": {"left": "left|left-hand", "centre": "centre|center|middle|ahead", "right": "right|right-hand"},
    "sky": {"clear": "clear|cloudless|unclouded|starry", "cloudy": "cloudy|overcast|clouds"},
}


def read_caption(text: str) -> dict[str, list[str]]:
    return {
        name: [value for value, words in classes.items() if re.search(rf"\b({words})\b", text.lower())]
        for name, classes in WORDS.items()
    }


def test_captions_are_read_back() -> None:
    scenes = [draw_scene(9, index) for index in range(10_000)]
    assert [read_factors(caption(scene)) for scene in scenes] == [factors(scene) for scene in scenes]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("snowy mountains at SUNSET", {"time": "sunset", "terrain": "mountains"}),
        ("the ocean, a pale sun on the left", {"terrain": "sea", "time": "dawn", "light": "left"}),
        ("dawn or dusk over the hills", {"terrain": "hills"}),
        ("the sun low over a leftover cat", {}),
        ("", {}),
    ],
)
def test_only_what_a_text_states_is_read(text: str, wanted: dict[str, str]) -> None:
    assert read_factors(text) == wanted


def test_scenes_are_pinned() -> None:
    drawn = ["/".join(factors(draw_scene(0, index)).values()) for index in range(4)]
    assert drawn == GOLDEN_FACTORS
    assert [caption(draw_scene(0, index)) for index in range(4)] == GOLDEN_CAPTIONS


GOLDEN_FACTORS = [
    "dawn/mountains/left/cloudy",
    "night/sea/right/clear",
    "night/hills/left/cloudy",
    "noon/hills/centre/cloudy",
]
GOLDEN_CAPTIONS = [
    "A picture of mountains in the early morning with the sun to the left and a sky full of clouds",
    "By night: the sea, a bright moon on the right-hand side, the sky clear.",
    "green hills at midnight; a pale moon on the left-hand side; a sky full of clouds",
    "in broad daylight at noon: rolling hills, the noon sun at the centre, the sky cloudy",
]


def test_factors_are_uniform_and_independent() -> None:
    count = 9600
    seen = Counter(tuple(factors(draw_scene(5, index)).values()) for index in range(count))
    expected = count / 96
    assert len(seen) == 96
    chi_squared = sum((n - expected) ** 2 / expected for n in seen.values())
    assert chi_squared < 150  # 95 degrees of freedom: above it with probability 0.0003


def test_a_scene_is_a_pure_function_of_seed_and_index() -> None:
    forwards = [(draw_scene(9, i), render(draw_scene(9, i))) for i in range(20)]
    for i in reversed(range(20)):
        assert draw_scene(9, i) == forwards[i][0]
        assert np.array_equal(render(draw_scene(9, i)), forwards[i][1])
    assert not np.array_equal(render(draw_scene(10, 0)), forwards[0][1])


@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (0, -1)])
def test_negative_counters_are_refused(seed: int, index: int) -> None:
    with pytest.raises(ValueError, match="negative"):
        draw_scene(seed, index)


@pytest.mark.parametrize("resolution", [32, 64, 128])
def test_pictures_are_uint8_and_square(resolution: int) -> None:
    picture = render(draw_scene(0, 1), resolution)
    assert picture.shape == (resolution, resolution, 3)
    assert picture.dtype == np.uint8
    assert picture.flags.c_contiguous
    assert picture.std() > 10


@pytest.mark.parametrize("resolution", [0, 16, 48, 100])
def test_other_resolutions_are_refused(resolution: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        render(draw_scene(0, 0), resolution)


@pytest.mark.parametrize("factor", [2, 4])
def test_a_larger_picture_is_the_same_picture(factor: int) -> None:
    correlations, differences = [], []
    for index in range(32):
        scene = draw_scene(1, index)
        small = render(scene, 64).astype(np.float64)
        large = render(scene, 64 * factor).astype(np.float64)
        shrunk = large.reshape(64, factor, 64, factor, 3).mean((1, 3))
        correlations.append(np.corrcoef(small.ravel(), shrunk.ravel())[0, 1])
        differences.append(np.abs(small - shrunk).mean())
    assert min(correlations) > 0.93
    assert np.mean(differences) < 4


def test_geometry_ignores_time_light_and_sky() -> None:
    frame, tables = frame_of(64), textures(64)
    for index in range(8):
        scene = draw_scene(2, index)
        land = land_of(scene, frame, tables)
        for hour, light, sky in itertools.product(Time, Light, Sky):
            other = land_of(dataclasses.replace(scene, time=hour, light=light, sky=sky), frame, tables)
            assert (other.horizon, other.water, other.window) == (land.horizon, land.water, land.window)
            assert all(np.array_equal(a.top, b.top) for a, b in zip(other.ridges, land.ridges, strict=True))


def test_every_factor_changes_the_picture() -> None:
    scene = draw_scene(3, 0)
    for name, members in FACTORS.items():
        pictures = [render(dataclasses.replace(scene, **{name: member})) for member in members]
        for one, other in itertools.combinations(pictures, 2):
            assert np.abs(one.astype(int) - other).mean() > 1.5, name


def test_the_brightest_spot_of_a_clear_sky_is_on_the_side_of_the_light() -> None:
    centres = {Light.LEFT: 0.21, Light.CENTRE: 0.5, Light.RIGHT: 0.79}
    found = Counter()
    total = 0
    for index in range(300):
        scene = dataclasses.replace(draw_scene(4, index), sky=Sky.CLEAR)
        sky = render(scene)[:40].astype(np.float64).sum(2)
        blurred = sum(np.roll(sky, (dy, dx), (0, 1)) for dy in (-1, 0, 1) for dx in (-1, 0, 1))
        x = (np.unravel_index(blurred.argmax(), blurred.shape)[1] + 0.5) / 64
        found[min(centres, key=lambda side: abs(centres[side] - x)) is scene.light] += 1
        total += 1
    assert found[True] / total > 0.93


def test_nights_are_dark_and_noons_are_bright() -> None:
    brightness = {
        time: np.mean([render(dataclasses.replace(draw_scene(6, i), time=time)).mean() for i in range(24)])
        for time in Time
    }
    assert brightness[Time.NIGHT] < 75 < 90 < brightness[Time.SUNSET] < brightness[Time.DAWN]
    assert brightness[Time.NOON] > 140


def test_captions_state_all_four_factors_and_no_other_class() -> None:
    for index in range(4000):
        scene = draw_scene(7, index)
        text = caption(scene)
        expected = {name: [value] for name, value in factors(scene).items()}
        assert read_caption(text) == expected, text


def test_the_reader_of_captions_can_fail() -> None:
    assert read_caption("hills at night under a sky")["sky"] == []
    assert read_caption("a clear sky full of clouds")["sky"] == ["clear", "cloudy"]
    assert read_caption("a bright moon over hills")["light"] == []


def test_captions_are_varied() -> None:
    assert len(set(PATTERNS)) == len(PATTERNS) >= 40
    texts = [caption(draw_scene(8, index)) for index in range(3000)]
    assert len(set(texts)) > 2900
    assert max(len(text) for text in texts) < 120
    assert not any("  " in text or "{" in text or re.search(r"\b[aA] [aeiou]", text) for text in texts)
    openings = Counter(text.split()[0].lower() for text in texts)
    assert len(openings) > 25


def test_a_sample_is_a_jpeg_its_caption_and_its_record() -> None:
    scene = draw_scene(11, 42)
    key, fields = encode(scene, 64)
    assert key == "landscape-00000042"
    assert set(fields) == {"jpg", "txt", "json"}
    image = Image.open(io.BytesIO(fields["jpg"]))
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (64, 64))
    assert np.abs(np.asarray(image).astype(int) - render(scene)).mean() < 3
    assert fields["txt"].decode() == caption(scene)
    expected = {**factors(scene), "seed": 11, "index": 42, "width": 64, "height": 64}
    assert json.loads(fields["json"]) == expected


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_shards_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    told: list[int] = []
    paths = write_landscapes(tmp_path / "one", 50, 32, 3, shard_size=20, progress=told.append)
    assert [path.name for path in paths] == ["000000.tar", "000001.tar", "000002.tar"]
    assert told == [20, 20, 10]
    write_landscapes(tmp_path / "two", 50, 32, 3, shard_size=20, workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    with tarfile.open(paths[2]) as shard:
        assert shard.getnames()[-1].startswith("landscape-00000049.")
        assert len(shard.getnames()) == 30


def test_a_stopped_run_is_finished_and_whole_shards_are_kept(tmp_path: Path) -> None:
    paths = write_landscapes(tmp_path, 30, 32, 3, shard_size=10)
    whole = contents(tmp_path)
    kept = paths[0].stat().st_mtime_ns, paths[0].stat().st_ino
    paths[1].write_bytes(paths[1].read_bytes()[:-5000])
    paths[2].unlink()
    write_landscapes(tmp_path, 30, 32, 3, shard_size=10)
    assert contents(tmp_path) == whole
    assert (paths[0].stat().st_mtime_ns, paths[0].stat().st_ino) == kept


def test_more_pictures_extend_a_folder(tmp_path: Path) -> None:
    write_landscapes(tmp_path / "a", 15, 32, 3, shard_size=10)
    write_landscapes(tmp_path / "a", 25, 32, 3, shard_size=10)
    write_landscapes(tmp_path / "b", 25, 32, 3, shard_size=10)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_folder_begun_with_shards_of_another_size_goes_on_with_those(tmp_path: Path) -> None:
    write_landscapes(tmp_path / "a", 20, 32, 3, shard_size=10)
    write_landscapes(tmp_path / "a", 25, 32, 3, shard_size=5, workers=2)
    write_landscapes(tmp_path / "b", 25, 32, 3, shard_size=10)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_process_that_cannot_write_is_an_error_and_ends_the_others(tmp_path: Path) -> None:
    (tmp_path / "000001.tar.part").mkdir()  # where the second process wants to write its first shard
    with pytest.raises(IsADirectoryError, match="000001"):
        write_landscapes(tmp_path, 2_000, 32, 3, shard_size=10, workers=2)
    assert len(list(tmp_path.glob("*.tar"))) < 100


def test_one_process_that_dies_is_an_error_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def start(sample: Any) -> "subprocess.Popen[bytes]":
        started.append(real(sample))
        if len(started) == 2:
            started[1].kill()
        return started[1] if len(started) == 2 else started[0]

    real = rendering._start
    monkeypatch.setattr(rendering, "_start", start)
    with pytest.raises(OSError, match="died of SIGKILL; what is whole stays: give the machine more memory"):
        write_landscapes(tmp_path, 2_000, 32, 3, shard_size=10, workers=2)
    assert len(list(tmp_path.glob("*.tar"))) < 100
    assert all(process.poll() is not None for process in started)


def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    """Killed, it cannot stop them; a new one soon writes to the same files."""
    code = f"""
from pathlib import Path
from data.landscapes import write_landscapes
write_landscapes(Path({str(tmp_path)!r}), 100_000, 32, 3, shard_size=50_000, workers=2)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT)
    try:
        wait_for(lambda: len(list(tmp_path.glob("*.part"))) == 2)
    finally:
        parent.kill()
        parent.wait()
    wait_for(lambda: not list(tmp_path.glob("*.part")))


def wait_for(what: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("content", ["[]", "{}", '{"shard_size": 0}', '{"shard_size": null}'])
def test_a_plan_that_says_something_else_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "landscapes.json").write_text(content)
    with pytest.raises(DataError, match="made with"):
        write_landscapes(tmp_path, 20, 32, 3, shard_size=10)


def test_other_data_is_never_mixed_in(tmp_path: Path) -> None:
    write_landscapes(tmp_path, 20, 32, 3, shard_size=10)
    with pytest.raises(DataError, match="made with"):
        write_landscapes(tmp_path, 20, 32, 4, shard_size=10)
    with pytest.raises(DataError, match="more than asked for"):
        write_landscapes(tmp_path, 10, 32, 3, shard_size=10)
    (tmp_path / "landscapes.json").unlink()
    with pytest.raises(DataError, match="not landscapes"):
        write_landscapes(tmp_path, 20, 32, 3, shard_size=10)
    with pytest.raises(ValueError, match="1 or more"):
        write_landscapes(tmp_path / "none", 0, 32, 3)


def test_pictures_and_captions_need_no_torch() -> None:
    code = "import sys, data.landscape_captions, data.landscape_painter; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=False).returncode == 0
