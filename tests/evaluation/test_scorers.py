"""Scores of pictures: who shows what was asked, swapped captions, the tree of questions."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from data.landscapes import caption, draw_scene, factors
from evaluation.adherence import AdherenceJudge
from evaluation.prompts import Prompt, read_prompts
from evaluation.scorers import AdherenceScorer, QuestionScorer, category_means, stated_factors

SCENES = [draw_scene(77, index) for index in range(200)]
PROMPTS = [Prompt(caption(scene), scene.time.value, str(k)) for k, scene in enumerate(SCENES)]


@pytest.fixture
def judge(quick_judge: AdherenceJudge) -> AdherenceJudge:
    return quick_judge


@pytest.fixture
def pictures(landscapes: Tensor) -> Tensor:
    return landscapes[: len(SCENES)]


def test_swapped_captions_are_caught(judge: AdherenceJudge, pictures: Tensor) -> None:
    scorer = AdherenceScorer(judge)
    right, swapped = scorer.score(pictures, PROMPTS), scorer.score(pictures, PROMPTS[1:] + PROMPTS[:1])
    assert right["all"].mean() > 0.4
    assert swapped["all"].mean() < 0.1
    for name in ("time", "terrain", "light", "sky"):
        assert right[name].mean() > swapped[name].mean() + 0.25
    assert set(category_means(right, PROMPTS)) == {"dawn", "noon", "sunset", "night"}


def test_a_score_is_its_pictures_alone(judge: AdherenceJudge, pictures: Tensor) -> None:
    scorer = AdherenceScorer(judge)
    whole = scorer.score(pictures, PROMPTS)
    one = scorer.score(pictures[150:151], PROMPTS[150:151])
    assert {name: values[0] for name, values in one.items()} == {name: v[150] for name, v in whole.items()}


def test_records_and_texts_state_the_same(judge: AdherenceJudge, pictures: Tensor) -> None:
    recorded = [
        dataclasses.replace(prompt, text="?", record=factors(scene))
        for prompt, scene in zip(PROMPTS, SCENES, strict=True)
    ]
    scorer = AdherenceScorer(judge)
    first, second = scorer.score(pictures, PROMPTS), scorer.score(pictures, recorded)
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_what_is_not_stated_is_not_scored(judge: AdherenceJudge, pictures: Tensor) -> None:
    prompts = [Prompt("the sea at night", "sea", "0"), Prompt("a cat", "cat", "1")]
    scores = AdherenceScorer(judge).score(pictures[:2], prompts)
    assert stated_factors(prompts[0]) == {"time": "night", "terrain": "sea"}
    assert np.isnan(scores["light"][0])
    assert scores["all"][0] == min(scores["time"][0], scores["terrain"][0])
    assert all(np.isnan(values[1]) for values in scores.values())
    means = category_means(scores, prompts)
    assert set(means["sea"]) == {"time", "terrain", "all"}
    assert means["cat"] == {}


def tree(*questions: tuple[str, list[str], str]) -> Prompt:
    rows = [{"id": name, "parents": parents, "question": text} for name, parents, text in questions]
    return Prompt("?", "all", "0", {"questions": rows})


def test_a_child_counts_only_where_its_parents_do() -> None:
    blank = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)

    def share(prompt: Prompt, *yes: str) -> float:
        return float(QuestionScorer(lambda _, text: text in yes).score(blank, [prompt])["questions"][0])

    # A grandchild that stands before its parent, as in some rows of the published file.
    cars = tree(("3", ["2"], "shiny?"), ("1", [], "a car?"), ("2", ["1"], "red?"), ("4", [], "a road?"))
    assert share(cars, "a car?", "red?", "shiny?", "a road?") == 1.0
    assert share(cars, "red?", "shiny?", "a road?") == 0.25
    assert share(cars, "a car?", "shiny?") == 0.25
    assert share(cars, "a car?", "red?") == 0.5
    circle = tree(("1", ["2", "9"], "a?"), ("2", ["1"], "b?"))
    assert share(circle, "a?", "b?") == 1.0
    assert share(circle, "b?") == 0.0
    assert math.isnan(share(Prompt("?", "all", "0")))


def test_no_question_is_asked_in_vain(shared_data: Path) -> None:
    prompts = read_prompts(shared_data / "prompts" / "dsg-1k-anns.csv").prompts
    blank = torch.zeros(len(prompts), 3, 2, 2, dtype=torch.uint8)
    asked: list[str] = []

    def nothing(_: Tensor, question: str) -> bool:
        asked.append(question)
        return False

    assert QuestionScorer(nothing).score(blank, prompts)["questions"].max() == 0.0
    # 3,311 of 8,182 depend on none; of some that depend on each other in a circle, one is asked.
    assert len(asked) == 3_320
    assert QuestionScorer(lambda *_: True).score(blank, prompts)["questions"].min() == 1.0


def test_each_picture_has_its_prompt(judge: AdherenceJudge, pictures: Tensor) -> None:
    for scorer in (AdherenceScorer(judge), QuestionScorer(lambda *_: True)):
        with pytest.raises(ValueError, match="one for each"):
            scorer.score(pictures[:3], PROMPTS[:2])
        with pytest.raises(ValueError, match="give uint8"):
            scorer.score(pictures[:2].float(), PROMPTS[:2])
