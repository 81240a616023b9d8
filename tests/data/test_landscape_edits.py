"""Edits of landscapes: one factor changes, all else stays bit for bit, and the words ask for that alone."""

import dataclasses
import io
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.landscape_edits import Edit, draw_edit, encode_edit, write_landscape_edits
from data.landscape_geometry import frame_of, land_of
from data.landscape_noise import textures
from data.landscapes import FACTORS, Sky, Time, draw_scene, factors, render, write_landscapes
from data.rendered import RenderedEdits
from data.shard_index import DataError

#: What a reader takes the words of an instruction for: factor -> value -> pattern.
WORDS = {
    "time": {
        "dawn": "dawn|daybreak|sunrise|early morning",
        "noon": "noon|midday",
        "sunset": "sunset|dusk|sundown|evening",
        "night": "night|midnight|night time",
    },
    "terrain": {
        "mountains": "mountains?|peaks",
        "hills": "hills",
        "desert": "desert|dunes",
        "sea": "sea|ocean",
    },
    "light": {"left": "left|left-hand", "centre": "centre|center|middle", "right": "right|right-hand"},
}
#: A clear sky is asked for by words that name clouds as well.
CLEARING = "clear|cloudless|remove|away|no clouds|get rid|erase|clouds go|without|empty"


def read_instruction(text: str) -> dict[str, list[str]]:
    found = {
        name: [value for value, words in classes.items() if re.search(rf"\b({words})\b", text.lower())]
        for name, classes in WORDS.items()
    }
    speaks = re.search(r"\b(clouds?|cloudy|cloudless|overcast|clear|weather)\b", text.lower())
    clears = re.search(rf"\b({CLEARING})\b", text.lower())
    found["sky"] = ["clear" if clears else "cloudy"] if speaks else []
    return found


@pytest.fixture(scope="module")
def edits() -> list[Edit]:
    return [draw_edit(3, index) for index in range(3000)]


def test_edits_are_pinned() -> None:
    assert [draw_edit(0, index).instruction for index in range(4)] == GOLDEN


GOLDEN = [
    "now at midday",
    "A cloudy sky",
    "Make the place a mountain range",
    "Let the sun shine at the right",
]


def test_exactly_one_factor_changes(edits: list[Edit]) -> None:
    for index, edit in enumerate(edits):
        before, after = factors(edit.before), factors(edit.after)
        assert [name for name in FACTORS if before[name] != after[name]] == [edit.factor]
        assert edit.before == draw_scene(3, index)
        assert (edit.after.seed, edit.after.index) == (3, index)
    counted = Counter(edit.factor for edit in edits)
    assert all(abs(counted[name] - 750) < 120 for name in FACTORS)
    for name, members in FACTORS.items():
        values = Counter(factors(edit.after)[name] for edit in edits if edit.factor == name)
        assert all(values[m.value] > 0.75 * values.total() / len(members) for m in members), name


def test_the_place_stays_the_same_bit_for_bit(edits: list[Edit]) -> None:
    frame, tables = frame_of(64), textures(64)
    for edit in edits[:200]:
        one, other = (land_of(scene, frame, tables) for scene in (edit.before, edit.after))
        same = all(
            len(one.ridges) == len(other.ridges) and np.array_equal(a.top, b.top)
            for a, b in zip(one.ridges, other.ridges, strict=False)
        )
        stays = (one.horizon, one.water) == (other.horizon, other.water) and same
        assert stays == (edit.factor != "terrain") or len(one.ridges) == len(other.ridges) == 0, edit
        assert one.window == other.window


def test_pixels_stay_where_the_edit_does_not_reach(edits: list[Edit]) -> None:
    """Clouds change no pixel below the sky's own light; a mixed-up counter would move everything."""
    for edit in [e for e in edits if e.factor == "sky" and e.before.time is Time.NOON][:20]:
        clear = edit.before if edit.before.sky is Sky.CLEAR else edit.after
        again = dataclasses.replace(dataclasses.replace(clear, sky=Sky.CLOUDY), sky=Sky.CLEAR)
        assert np.array_equal(render(clear), render(again))
        difference = np.abs(render(edit.before).astype(int) - render(edit.after))
        assert difference[:20].mean() > 1.3 * difference[48:].mean()


def test_instructions_ask_for_the_change_and_nothing_else(edits: list[Edit]) -> None:
    for edit in edits:
        wanted: dict[str, list[str]] = {name: [] for name in FACTORS} | {
            edit.factor: [factors(edit.after)[edit.factor]]
        }
        assert read_instruction(edit.instruction) == wanted, edit.instruction


def test_the_reader_can_fail() -> None:
    assert read_instruction("put the sun over the sea on the left")["terrain"] == ["sea"]
    assert read_instruction("make it sunny")["sky"] == []


def test_sun_and_moon_fit_the_hour(edits: list[Edit]) -> None:
    seen: Counter[tuple[str, bool]] = Counter()
    for edit in edits:
        words = set(re.findall(r"\b(sun|moon)\b", edit.instruction.lower()))
        night = edit.before.time is Time.NIGHT
        assert words <= ({"moon"} if night else {"sun"}), edit.instruction
        assert not words or edit.factor == "light"
        seen[(edit.factor, bool(words))] += 1
    assert seen[("light", True)] > 100
    assert seen[("light", False)] > 100


def test_instructions_are_varied(edits: list[Edit]) -> None:
    texts = {edit.instruction for edit in edits}
    assert len(texts) > 600
    assert max(len(text) for text in texts) < 64
    assert not any("{" in text or "  " in text or re.search(r"\b[aA] [aeiou]", text) for text in texts)
    for name, members in FACTORS.items():
        for member in members:
            mine = {
                edit.instruction.lower()
                for edit in edits
                if edit.factor == name and factors(edit.after)[name] == member.value
            }
            assert len(mine) >= 12, (name, member)


def test_negative_counters_are_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        draw_edit(0, -1)


def test_a_sample_is_a_pair_its_instruction_and_its_record() -> None:
    edit = draw_edit(11, 42)
    key, fields = encode_edit(edit, 64)
    assert key == "edit-00000042"
    assert set(fields) == {"before.jpg", "jpg", "txt", "json"}
    for name, scene in (("before.jpg", edit.before), ("jpg", edit.after)):
        picture = np.asarray(Image.open(io.BytesIO(fields[name])))
        assert np.abs(picture.astype(int) - render(scene)).mean() < 3
    assert fields["txt"].decode() == edit.instruction
    record = json.loads(fields["json"])
    assert {name: record[name] for name in FACTORS} == factors(edit.after)
    assert record["before"] == factors(edit.before)
    assert (record["factor"], record["seed"], record["index"]) == (edit.factor, 11, 42)


def test_shards_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    for name, workers in (("one", 0), ("two", 2)):
        write_landscape_edits(tmp_path / name, 24, 32, 3, shard_size=8, workers=workers)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
    assert len(one) == 7


def test_other_data_is_never_mixed_in(tmp_path: Path) -> None:
    write_landscapes(tmp_path / "plain", 4, 32, 3)
    with pytest.raises(DataError, match="not landscape_edits"):
        write_landscape_edits(tmp_path / "plain", 4, 32, 3)
    write_landscape_edits(tmp_path / "edits", 4, 32, 3)
    with pytest.raises(DataError, match="made with"):
        write_landscape_edits(tmp_path / "edits", 4, 32, 4)


def test_training_and_held_out_pairs_are_of_other_seeds(tmp_path: Path) -> None:
    folder = RenderedEdits(images=3, held_out=2, folder=str(tmp_path)).write(32, 1)
    assert folder.name == "landscape-edits-32-3"
    seeds = {name: json.loads((folder / name / "landscape_edits.json").read_text())["seed"] for name in
             ("train", "val")}  # fmt: skip
    assert seeds["train"] != seeds["val"]
    with pytest.raises(ValueError, match="at least 1"):
        RenderedEdits(images=0)
