"""The measure of edits tells apart one that is perfect, one that does nothing and one that does too much."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from data.landscape_edits import Edit, draw_edit
from data.landscapes import FACTORS, Scene, Sky, factors
from evaluation.editing import Edited, renders, score_edits

SIDE = 32
EDITS = [draw_edit(5, k) for k in range(48)]


def figures_of(judge: Any, choose: Callable[[Edit], Scene], edits: list[Edit] = EDITS) -> dict[str, Any]:
    """The figures of edits whose pictures are the exact renders of the scenes that `choose` makes of them."""
    before, made, after = (
        renders([scene(edit) for edit in edits], SIDE)
        for scene in (lambda edit: edit.before, choose, lambda edit: edit.after)
    )
    return score_edits(judge, Edited(edits, before, made, after))


class Oracle:
    """Reads the factors off a picture by finding it among the renders it knows."""

    def __init__(self, scenes: list[Scene]) -> None:
        self.known = (renders(scenes, SIDE).float() / 127.5 - 1).flatten(1)
        self.classes = {
            name: torch.tensor([[m.value for m in members].index(factors(scene)[name]) for scene in scenes])
            for name, members in FACTORS.items()
        }

    def predict(self, images: Tensor) -> dict[str, Tensor]:
        nearest = torch.cdist(images.flatten(1), self.known, p=1).argmin(1)
        return {name: classes[nearest] for name, classes in self.classes.items()}


def cloudier(edit: Edit) -> Scene:
    """The edit done, and clouds besides."""
    return dataclasses.replace(edit.after, sky=Sky.CLOUDY)


@pytest.fixture(scope="module")
def judge() -> Any:
    scenes = [scene for edit in EDITS for scene in (edit.before, edit.after, cloudier(edit))]
    return Oracle(scenes)


def test_a_perfect_editor(judge: Any) -> None:
    figures = figures_of(judge, lambda edit: edit.after)
    assert figures["edits"] == 48
    assert figures["changed"] == figures["all"] == 1.0
    assert figures["changed_by_factor"] == figures["kept"] == dict.fromkeys(FACTORS, 1.0)
    assert figures["error"] == 0
    assert 0 < figures["unedited_error"] < 2
    assert 0.05 < figures["unedited_share"] < 0.9


def test_a_lazy_editor(judge: Any) -> None:
    figures = figures_of(judge, lambda edit: edit.before)
    assert figures["changed"] == figures["all"] == 0.0
    assert figures["changed_by_factor"] == dict.fromkeys(FACTORS, 0.0)
    assert figures["kept"] == dict.fromkeys(FACTORS, 1.0)
    assert figures["unedited_error"] == 0
    assert figures["error"] > 5
    ends = {key: figures[key] for key in figures["doing_nothing"]}
    assert figures["doing_nothing"] == ends
    assert figures["ceiling"]["changed"] == 1.0


def test_an_editor_that_does_too_much(judge: Any) -> None:
    figures = figures_of(judge, cloudier)
    others = [edit for edit in EDITS if edit.factor != "sky"]
    kept = sum(edit.before.sky is Sky.CLOUDY for edit in others) / len(others)
    assert figures["kept"]["sky"] == pytest.approx(kept)
    assert figures["kept"]["terrain"] == 1.0
    asked = [edit for edit in EDITS if edit.factor == "sky"]
    done = sum(edit.after.sky is Sky.CLOUDY for edit in asked) / len(asked)
    assert figures["changed_by_factor"]["sky"] == pytest.approx(done)
    assert figures["changed_by_factor"]["time"] == 1.0
    assert figures["unedited_error"] > 2


def test_kinds_of_edits_that_are_not_there_have_no_share(judge: Any) -> None:
    only = [edit for edit in EDITS if edit.factor == "sky"][:1]
    figures = figures_of(judge, lambda edit: edit.after, only)
    assert figures["changed_by_factor"]["time"] is None
    assert figures["kept"]["sky"] is None
    assert figures["changed"] == 1.0
